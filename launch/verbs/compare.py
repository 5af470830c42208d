"""``pfc compare``: several runs on one page."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import complete_run, print_table
from ..models import check_new_file


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN...", help="Folders of runs, finished or not.", autocompletion=complete_run),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="Write the page with their curves there.")
    ] = None,
) -> int:
    """Compare runs: what they came to, and where their configurations differ.

    With --out also a page with their losses, evaluations, rates and speeds in one picture each.
    """
    from ...engine.report.compare import compare as compared
    from ...engine.report.compare import write_comparison

    if out is not None:
        check_new_file(out, ".html")
    found, records = compared(runs)
    print_table(found.results[0], found.results[1:])
    print()
    if len(found.differences) > 1:
        print_table(("configuration", *found.names), found.differences[1:])
    else:
        print("the configurations are the same")
    if out is not None:
        write_comparison(out, found, records)
        print(f"report     {out}")
    return 0
