"""``pfc export``: a trained backbone as ONNX, or its weights as safetensors."""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...data.errors import UsageError
from ..models import Source, Trained, check_new_file, open_backbone, write_whole

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-3
"""Largest difference allowed between the exported embedding and torch's, as a share of the embedding's length."""


def export(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT.onnx|OUT.safetensors", help="File to write; it must not exist.")],
) -> None:
    """Write the backbone as an ONNX file, and check it; or its weights as they are.

    OUT.safetensors holds weights and buffers under PyTorch's names, and nothing that could run.

    OUT.onnx: input `images`: float32, N x 3 x height x width, RGB, from -1 to 1. Output `embeddings`: float32, N x D,
    not normalised. N may be any number. The file is kept only if ONNX Runtime and the original agree.
    """
    check_new_file(out, ".onnx", ".safetensors")
    if out.suffix == ".safetensors":
        _export_weights(source, out)
        return
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"export needs {error.name}: pip install 'pfc[export]'") from None
    import torch

    trained = open_backbone(source, torch.device("cpu"))
    difference = 0.0

    def write(path: Path) -> None:
        nonlocal difference
        _export(trained, path)
        difference = _largest_difference(trained, path)
        if not difference <= TOLERANCE:
            raise RuntimeError(f"the exported network differs from the original by {difference:.2e} of its length")

    write_whole(out, write)
    height, width = trained.image_size
    print(f"wrote {out}: images [batch, 3, {height}, {width}] to embeddings [batch, {trained.embedding_dim}]")
    print(f"largest difference from PyTorch: {difference:.1e} of the embedding's length")


def _export_weights(source: Path, out: Path) -> None:
    from safetensors.torch import save_file

    from ...engine.checkpoint import load_backbone

    network, config = load_backbone(source)
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    assert config.data.image_size is not None
    section, (height, width) = config.backbone, config.data.image_size
    told = {"backbone": section.name, "embedding_dim": str(section.embedding_dim), "image_size": f"{height}x{width}"}
    write_whole(out, lambda path: save_file(weights, path, metadata=told))
    count = sum(value.numel() for value in weights.values())
    print(f"wrote {out}: {len(weights)} tensors of {section.name}, {count / 1e6:.2f} M numbers")


def _export(trained: Trained, path: Path) -> None:
    import torch

    # What the exporter has to say is about its insides, and about packages that pfc does not use.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            trained.model,
            (_images(trained, batch=2),),
            str(path),
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _largest_difference(trained: Trained, path: Path) -> float:
    """Between ONNX Runtime and torch, over batches of 1 and 3 random images, relative to the embedding's length."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for batch in (1, 3):
        images = _images(trained, batch)
        (exported,) = session.run(["embeddings"], {"images": images.numpy()})
        with torch.inference_mode():
            expected = trained.model(images)
        difference = (torch.from_numpy(exported) - expected).norm(dim=1) / expected.norm(dim=1)
        largest = max(largest, difference.max().item())
    return largest


def _images(trained: Trained, batch: int) -> "torch.Tensor":
    import torch

    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, 3, *trained.image_size, generator=generator) * 2 - 1
