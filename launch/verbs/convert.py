"""``pfc convert``: what was trained with the common implementation, as a run of pfc."""

from pathlib import Path
from typing import Annotated

import typer

from ...data.errors import UsageError
from ..console import parse_size


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A model.pt, or the folder with checkpoint_gpu_0.pt and so on.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The run's folder; it must not hold anything yet.")],
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The network. [dim]\\[default: the IResNet that has as many blocks][/dim]",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="PX|HxW",
            help="Its images' side in pixels, or height x width. [dim]\\[default: the square that fits][/dim]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Bring in a backbone, and its centers and their momentum, trained with the common PyTorch implementation.

    OUT is then a run for pfc evaluate, embed and export; with the checkpoints of all ranks also for
    pfc train CONFIG.yaml --resume OUT. SRC is only read, and no code in it is run.
    """
    sides = parse_size(size) if size is not None else None
    if size is not None and sides is None:
        raise UsageError("--size keep: a network has one size; write pixels as 112, or height and width as 112x96")
    from ...engine.convert.convert import convert

    print(convert(source, out, backbone=backbone, image_size=sides))
