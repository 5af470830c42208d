"""``pfc inspect``: what a packed data set holds, and whether it is whole."""

from pathlib import Path
from typing import Annotated

import typer

from ...data.errors import UsageError
from ..console import progress_bar


def inspect(
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="A packed data set: a folder of .rec and .idx files, or one .rec.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    decode: Annotated[bool, typer.Option(help="Decode every image, or read only its first bytes.")] = True,
    checksums: Annotated[bool, typer.Option(help="Compare the shards with the checksums in dataset.json.")] = True,
    limit: Annotated[
        int | None,
        typer.Option(min=0, help="List this many errors. [dim]\\[default: 20, as JSON 1000][/dim]", show_default=False),
    ] = None,
    repair: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Copy the good images to OUT, a directory that is new or empty."),
    ] = None,
    rebuild_index: Annotated[
        bool, typer.Option("--rebuild-index", help="Make missing .idx files from their .rec, and nothing else.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="With --rebuild-index: replace .idx files, too.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes. [dim]\\[default: one a core][/dim]", show_default=False),
    ] = None,
) -> int:
    """Read every record of a data set: framing, labels, images and checksums.

    Reads pfc's own shards and MXNet's (im2rec's, and InsightFace's with a header record). Exits with 1 where it finds
    damage, with --repair with 0 when the copy is complete.
    """
    if rebuild_index:
        if repair is not None or json:
            raise UsageError(
                "--rebuild-index does nothing else: leave out --repair and --json, and call it again after"
            )
        return _rebuild(dataset, force)
    if force:
        raise UsageError("--force belongs to --rebuild-index: it replaces .idx files and nothing else")
    from ...data import inspect_dataset

    shown = limit if limit is not None else (1000 if json else 20)
    with progress_bar("reading") as progress:
        report = inspect_dataset(
            dataset,
            decode=decode,
            checksums=checksums,
            workers=workers,
            max_errors=shown,
            repair=repair,
            progress=progress,
        )
    print(report.to_json() if json else report)
    return 0 if report.ok or repair is not None else 1


def _rebuild(dataset: Path, force: bool) -> int:
    from ...data import rebuild_index

    with progress_bar("reading bytes") as progress:
        made = rebuild_index(dataset, force=force, progress=progress)
    for index in made:
        print(index)
    return 0
