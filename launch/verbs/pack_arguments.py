"""Arguments and options that several pack verbs share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not hold anything yet.")]
Size = Annotated[str, typer.Option(metavar="PX|HxW", help="Side of the images in pixels, or height x width.")]
Quality = Annotated[int, typer.Option(min=1, max=100, help="JPEG quality.")]
Shards = Annotated[int, typer.Option(min=1, help="Number of .rec files.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes. [dim]\\[default: one a core][/dim]", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the packed data set that is at OUT.")]

# Of the verbs that pack what a person brings.
StoredSize = Annotated[
    str | None,
    typer.Option(
        metavar="PX|HxW|keep",
        help="Side in pixels, height x width, or keep each image's own. [dim]\\[default: 112][/dim]",
        show_default=False,
    ),
]
Encoding = Annotated[Literal["jpeg", "png"], typer.Option(help="How to store images; png loses nothing.")]
KeepBytes = Annotated[bool, typer.Option("--keep-bytes", help="Store every file as it is, whatever it is.")]
Root = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="What the paths are relative to. [dim]\\[default: the folder of SRC][/dim]",
        show_default=False,
    ),
]
MinImages = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Leave out identities with fewer images.", show_default=False),
]
Only = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Pack only the identities named in this file, a name a line."),
]
Without = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Leave out the identities named in this file, a name a line."),
]
KeepLabels = Annotated[
    bool,
    typer.Option("--keep-labels", help="Keep the source's label numbers; otherwise they become 0, 1, 2, ..."),
]
ImagesPerShard = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Most images in a .rec file, instead of --shards.", show_default=False),
]
Shuffle = Annotated[bool, typer.Option(help="Shuffle all images by the seed, or keep the order of SRC.")]
ShuffleSeed = Annotated[int, typer.Option(min=0, help="Seed of the shuffle.")]
Name = Annotated[
    str | None, typer.Option(help="Name of the data set. [dim]\\[default: that of OUT][/dim]", show_default=False)
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")]
