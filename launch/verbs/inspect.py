"""``pfc inspect``: what a packed data set holds, and whether it is whole."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import progress_bar


def inspect(
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="A packed data set: a folder of .rec and .idx files, or one .rec.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    decode: Annotated[bool, typer.Option(help="Decode every image, or read only its first bytes.")] = True,
    checksums: Annotated[bool, typer.Option(help="Compare the shards with the checksums in dataset.json.")] = True,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes. [dim]\\[default: one a core][/dim]", show_default=False),
    ] = None,
) -> int:
    """Read every record of a data set: framing, labels, images and checksums.

    Reads pfc's own shards and MXNet's (im2rec's, and InsightFace's with a header record). Exits with 1 where it finds
    damage.
    """
    from ...data import inspect_dataset

    with progress_bar("reading") as progress:
        report = inspect_dataset(dataset, decode=decode, checksums=checksums, workers=workers, progress=progress)
    print(report.to_json() if json else report)
    return 0 if report.ok else 1
