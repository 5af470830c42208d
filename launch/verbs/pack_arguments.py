"""Arguments and options that several pack verbs share."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..console import parse_size, progress_bar

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
Root = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="What the paths are relative to. [dim]\\[default: the folder of SRC][/dim]",
        show_default=False,
    ),
]
_STORED: dict[str, tuple[Any, Any]] = {
    "size": (
        Annotated[
            str | None,
            typer.Option(
                metavar="PX|HxW|keep",
                help="Side in pixels, height x width, or keep each image's own. [dim]\\[default: 112][/dim]",
                show_default=False,
            ),
        ],
        None,
    ),
    "encoding": (
        Annotated[Literal["jpeg", "png"], typer.Option(help="How to store images; png loses nothing.")],
        "jpeg",
    ),
    "quality": (Quality, 95),
    "keep_bytes": (
        Annotated[bool, typer.Option("--keep-bytes", help="Store every file as it is, whatever it is.")],
        False,
    ),
}
_CONVERTED: dict[str, tuple[Any, Any]] = {
    "check": (
        Annotated[bool, typer.Option("--check", help="Decode every image; leave out those that fail.")],
        False,
    ),
    "size": (
        Annotated[
            str | None, typer.Option(metavar="PX|HxW", help="Convert images of another size.", show_default=False)
        ],
        None,
    ),
    "encoding": (
        Annotated[Literal["jpeg", "png"] | None, typer.Option(help="Re-encode images that are not this.")],
        None,
    ),
    "quality": (
        Annotated[
            int | None,
            typer.Option(min=1, max=100, help="Of re-encoded images. [dim]\\[default: 95][/dim]", show_default=False),
        ],
        None,
    ),
}
_SHARED: dict[str, tuple[Any, Any]] = {
    "min_images": (
        Annotated[
            int | None,
            typer.Option(min=1, metavar="N", help="Leave out identities with fewer images.", show_default=False),
        ],
        None,
    ),
    "only": (
        Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Pack only the identities named in this file, a name a line."),
        ],
        None,
    ),
    "without": (
        Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Leave out the identities named in this file, a name a line."),
        ],
        None,
    ),
    "keep_labels": (
        Annotated[
            bool,
            typer.Option("--keep-labels", help="Keep the source's label numbers; otherwise they become 0, 1, 2, ..."),
        ],
        False,
    ),
    "shards": (Shards, 1),
    "images_per_shard": (
        Annotated[
            int | None,
            typer.Option(
                min=1, metavar="N", help="Most images in a .rec file, instead of --shards.", show_default=False
            ),
        ],
        None,
    ),
    "shuffle": (
        Annotated[bool, typer.Option(help="Shuffle all images by the seed, or keep the order of SRC.")],
        True,
    ),
    "seed": (Annotated[int, typer.Option(min=0, help="Seed of the shuffle.")], 0),
    "workers": (Workers, None),
    "name": (
        Annotated[
            str | None,
            typer.Option(help="Name of the data set. [dim]\\[default: that of OUT][/dim]", show_default=False),
        ],
        None,
    ),
    "strict": (
        Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")],
        False,
    ),
    "overwrite": (Overwrite, False),
}


def pack_verb(*, files: bool = True, numbered: bool = True) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Makes a verb of a function that packs, and returns a summary: with the options that all sources share.

    The function gets those that were given as keyword arguments, as ``PackOptions`` names them, with the progress bar.

    Args:
        files: whether it stores image files, or converts what is stored already.
        numbered: whether its labels may be numbers that can be kept.
    """
    shared = (_STORED if files else _CONVERTED) | _SHARED
    if not numbered:
        del shared["keep_labels"]

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        @wraps(function)
        def verb(**values: Any) -> None:
            given = {name: value for name, value in values.items() if value is not None}
            if "size" in given:
                given["size"] = parse_size(given["size"])
            with progress_bar("packing") as given["progress"]:
                print(function(**given))

        own = [
            parameter
            for parameter in signature(function).parameters.values()
            if parameter.kind is not Parameter.VAR_KEYWORD
        ]
        added = [
            Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)
            for name, (annotation, default) in shared.items()
        ]
        verb.__signature__ = Signature(own + added)  # type: ignore[attr-defined]
        verb.__annotations__ = {parameter.name: parameter.annotation for parameter in own + added}
        return verb

    return decorate
