"""``pfc export``: a trained backbone as ONNX, in the layout of the Hugging Face Hub, or its weights as safetensors."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...data.errors import UsageError
from ..console import warn
from ..models import Source, check_new_file, check_new_folder, new_folder, write_whole

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...engine.config import Config
    from ...engine.sharing.onnx_file import Precision

TOLERANCE = 1e-3
"""Largest difference allowed between the embedding in float32 and torch's, as a share of the embedding's length."""
ALIKE = 0.999
"""Cosine to the original below which an export in lower precision comes with a warning."""
COMPARED = 96
"""Images that the exported network is measured on."""


def export(
    source: Source,
    out: Annotated[
        Path, typer.Argument(metavar="OUT.onnx|FOLDER|OUT.safetensors", help="What to write; it must not exist.")
    ],
    fp16: Annotated[bool, typer.Option("--fp16", help="ONNX with weights in float16: half the size.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="ONNX with weights in 8 bits (dynamic quantisation): a quarter of the size.")
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGES",
            help="A packed data set or a folder, to compare with the original on. [dim]\\[default: the run's "
            "evaluation sets, where they are there; else random images][/dim]",
            show_default=False,
        ),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Put model.onnx into FOLDER too.")] = True,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Of the model, for its card, as the Hub calls it: apache-2.0."),
    ] = None,
    threshold: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="For the card: what pfc threshold --json has printed.")
    ] = None,
) -> None:
    """Write the backbone as an ONNX file, and measure it; in the Hugging Face Hub's layout; or its weights alone.

    FOLDER gets config.json, model.safetensors, model.onnx and a model card, README.md, for the Hub or to be loaded
    where it is: see docs/sharing.md. OUT.safetensors holds weights and buffers under PyTorch's names, and nothing that
    could run.

    OUT.onnx: input `images`: float32, N x 3 x height x width, RGB, from -1 to 1. Output `embeddings`: float32, N x D,
    not normalised. N may be any number. What ONNX Runtime computes is compared with the original, in batches of 1, 3
    and 8; in float32 the file is kept only if they agree.
    """
    folder = re.fullmatch(r"\.[A-Za-z]\w*", out.suffix) is None  # photos-v1.5 is a folder, and photos.pt a mistake
    if folder:
        check_new_folder(out)
    else:
        check_new_file(out, ".onnx", ".safetensors")
    if fp16 and int8:
        raise UsageError("--fp16 and --int8: give one of them, and export twice for both")
    if not folder and (not onnx or licence is not None or threshold is not None):
        raise UsageError(f"{out}: --no-onnx, --license and --threshold are for a folder")
    precision: Precision = "float16" if fp16 else "int8" if int8 else "float32"
    if folder:
        if licence is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence) is None:
            raise UsageError(f"--license {licence}: write it as the Hub calls it, such as apache-2.0, mit or other")
        _export_folder(source, out, precision if onnx else None, images, licence, threshold)
    elif out.suffix == ".safetensors":
        if fp16 or int8 or images is not None:
            raise UsageError("--fp16, --int8 and --images are for ONNX: weights are written as they are")
        _export_weights(source, out)
    else:
        _export_onnx(source, out, precision, images)


def _export_onnx(source: Path, out: Path, precision: "Precision", images: Path | None) -> None:
    from ...engine.build import input_size
    from ...engine.checkpoint import load_backbone
    from ...engine.sharing.onnx_file import need_onnx

    need_onnx()
    network, config = load_backbone(source)
    compared = _images_to_compare(config, images)
    write_whole(out, lambda path: _write_onnx(network, config, path, precision, *compared))
    height, width = input_size(config)
    dim = config.backbone.embedding_dim
    print(f"wrote {out}: images [batch, 3, {height}, {width}] to embeddings [batch, {dim}], {precision}")


def _export_folder(
    source: Path,
    out: Path,
    precision: "Precision | None",
    images: Path | None,
    licence: str | None,
    threshold: Path | None,
) -> None:
    try:
        from ...engine.sharing.hub import EmbeddingNetwork
    except ImportError as error:
        raise UsageError(str(error)) from None
    from ...engine.build import input_size
    from ...engine.checkpoint import find, load_backbone
    from ...engine.sharing.card import model_card
    from ...engine.sharing.onnx_file import need_onnx
    from ...engine.sharing.preparing import preprocessing

    if precision is not None:
        need_onnx()
    elif images is not None:
        raise UsageError("--images is what model.onnx is compared on: leave --no-onnx out")
    found = find(source)
    trained, config = load_backbone(found.path)
    section = config.backbone
    about = {"name": section.name, "embedding_dim": section.embedding_dim, "options": section.options}
    network = EmbeddingNetwork(about, preprocessing(input_size(config)), config.evaluation.flip)
    network.backbone.load_state_dict(trained.state_dict())
    with new_folder(out) as partial:
        measured = None
        if precision is not None:
            compared = _images_to_compare(config, images)
            measured = _write_onnx(trained, config, partial / "model.onnx", precision, *compared)
        network.card = model_card(out.resolve().name, found, onnx=measured, licence=licence, threshold=threshold)
        network.save_pretrained(partial)
    print(f"wrote {out}: config.json, model.safetensors, README.md{', model.onnx' * (precision is not None)}")


def _export_weights(source: Path, out: Path) -> None:
    from safetensors.torch import save_file

    from ...engine.build import input_size
    from ...engine.checkpoint import load_backbone

    network, config = load_backbone(source)
    weights = {name: value.clone().contiguous() for name, value in network.state_dict().items()}  # also of tied ones
    section, (height, width) = config.backbone, input_size(config)
    told = {"backbone": section.name, "embedding_dim": str(section.embedding_dim), "image_size": f"{height}x{width}"}

    def write(path: Path) -> None:
        save_file(weights, path, metadata=told)
        path.chmod(0o644)  # safetensors makes it its owner's alone

    write_whole(out, write)
    count = sum(value.numel() for value in weights.values())
    print(f"wrote {out}: {len(weights)} tensors of {section.name}, {count / 1e6:.2f} M numbers")


def _write_onnx(
    network: "nn.Module", config: "Config", path: Path, precision: "Precision", images: "Tensor", told: str
) -> str:
    """Writes the file and says how near it comes to the original; returns that in a few words.

    Raises:
        UsageError: in this precision its embeddings are not finite.
        RuntimeError: in float32 it differs.
    """
    from ...engine.build import input_size
    from ...engine.sharing import onnx_file

    about = {"backbone": config.backbone.name, "embedding_dim": str(config.backbone.embedding_dim)}
    onnx_file.write_onnx(network, path, input_size(config), precision, about)
    found = onnx_file.agreement(network, path, images)
    if precision == "float32":
        if not found.difference <= TOLERANCE:
            raise RuntimeError(
                f"the exported network differs from the original by {found.difference:.2e} of its length"
            )
    elif not math.isfinite(found.difference):
        raise UsageError(f"in {precision} the network's embeddings are not finite: export it in another precision")
    elif found.least < ALIKE:
        warn(f"in {precision} an embedding moves to a cosine of {found.least:.4f}: evaluate before you use it")
    sizes = ", ".join(map(str, onnx_file.BATCHES))
    print(f"cosine to PyTorch's embeddings: mean {found.mean:.6f}, minimum {found.least:.6f}")
    print(f"measured with ONNX Runtime on this CPU in batches of {sizes}, over {len(images)} {told}")
    return f"{precision}; cosine to PyTorch's embeddings {found.mean:.6f} in the mean, {found.least:.6f} at least"


def _images_to_compare(config: "Config", given: Path | None) -> "tuple[Tensor, str]":
    """Images as the network gets them, [n, 3, H, W], spread over the set, and what they are, in words."""
    import torch

    from ...data import decode_images, read_pairs
    from ...data.protocols.images import open_images
    from ...data.protocols.table import read_protocol
    from ...engine.build import input_size
    from .embed import open_some

    size = input_size(config)

    def decoded(encoded: list) -> "Tensor":
        return torch.cat(list(decode_images(encoded, image_size=size, batch_size=COMPARED)))

    def some(number: int) -> list[int]:
        return [place * number // min(number, COMPARED) for place in range(min(number, COMPARED))]

    if given is not None:
        return decoded(open_some(given, COMPARED)), f"images of {given.name}"
    for name in (*config.evaluation.pairs, *config.evaluation.sets):
        path = Path(name)
        try:
            if path.suffix == ".bin":
                encoded = read_pairs(path).images
            else:
                protocol = read_protocol(path)
                encoded = open_images(protocol.images, protocol.folder, protocol.landmarks, size)
            return decoded([encoded[place] for place in some(len(encoded))]), f"images of {path.stem}"
        except UsageError:  # not here, or not readable: another set, or none, will do
            continue
    generator = torch.Generator().manual_seed(0)
    return torch.rand(COMPARED, 3, *size, generator=generator) * 2 - 1, (
        "random images, as none of the run's evaluation sets can be read here: --images gives others"
    )
