"""A backbone as an ONNX file, in float32, float16 or int8; and what ONNX Runtime makes of it, measured."""

import contextlib
import io
import json
import logging
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ...data.errors import UsageError
from .preparing import preprocessing

Precision = Literal["float32", "float16", "int8"]
"""Of the weights in the file, and of what is computed where the runtime has it; inputs and outputs stay float32."""

BATCHES = (1, 3, 8)
"""Sizes of the batches that are compared."""


@dataclass(frozen=True)
class Agreement:
    """How near ONNX Runtime's embeddings come to PyTorch's, over all images, each in batches of every size.

    Attributes:
        mean, least: of the cosines.
        difference: the largest, as a share of the embedding's length; NaN where an embedding is not finite.
    """

    mean: float
    least: float
    difference: float


def need_onnx() -> None:
    """UsageError where a package is missing that the files are made or measured with."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"ONNX needs {error.name}: pip install 'pfc[export]'") from None


def write_onnx(
    network: nn.Module, path: Path, image_size: tuple[int, int], precision: Precision, about: dict[str, str]
) -> None:
    """Writes ``images`` [N, 3, H, W] → ``embeddings`` [N, D], both float32, for any N.

    int8: dynamic quantisation. Weights are unsigned, with a scale for each channel: signed ones overflow in the
    products of processors that have no instruction for them. Activations get their scale from the whole batch, so an
    embedding depends a little on the images beside it.

    Args:
        network: in eval mode, on the CPU.
        about: what the file says besides ``preprocessing``.
    """
    import onnx

    _export(network, path, image_size)
    if precision == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        with _quiet():  # of weights that are too small for float16, and become its smallest number
            onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)
    elif precision == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with _quiet():  # of a preparation that makes no difference here
            quantize_dynamic(path, path, per_channel=True, weight_type=QuantType.QUInt8)
    model = onnx.load(path)
    _forget_traces(model)
    size = preprocessing(image_size)
    told = {"preprocessing": json.dumps(size), "precision": precision, "pfc": version("pfc"), **about}
    onnx.helper.set_model_props(model, told)
    onnx.save(model, path)


def agreement(network: nn.Module, path: Path, images: Tensor) -> Agreement:
    """ONNX Runtime on this CPU beside ``network``, over ``images`` [n, 3, H, W], in batches of each of ``BATCHES``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    cosines, differences = [], []
    with torch.inference_mode():
        expected = torch.cat([network(batch) for batch in images.split(max(BATCHES))]).double()
    for size in BATCHES:
        found = [session.run(["embeddings"], {"images": batch.numpy()})[0] for batch in images.split(size)]
        embeddings = torch.cat([torch.from_numpy(one) for one in found]).double()
        cosines.append(cosine_similarity(embeddings, expected, dim=1))
        differences.append((embeddings - expected).norm(dim=1) / expected.norm(dim=1))
    cosine = torch.cat(cosines)
    return Agreement(cosine.mean().item(), cosine.min().item(), torch.cat(differences).max().item())


def _export(network: nn.Module, path: Path, image_size: tuple[int, int]) -> None:
    with _quiet():
        torch.onnx.export(
            network,
            (torch.zeros(2, 3, *image_size),),
            str(path),
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _forget_traces(model: Any) -> None:
    """The exporter says of every node which lines of which files it comes from: paths of this machine."""
    graphs: list[Any] = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        del graph.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]


@contextlib.contextmanager
def _quiet() -> Any:
    """What the converters have to say is about their insides, and about packages that pfc does not use."""
    names = ("torch.onnx", "root")
    levels = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)
