"""``pfc sweep``: one configuration over a grid of values and seeds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import print_table, warn

if TYPE_CHECKING:
    from ..sweep import Outcome, Sweep


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="Recipe, axes and seeds: docs/sweeps.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="Values of all runs.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the runs; what it has of them is kept. [dim]\\[default: runs/NAME of the file][/dim]",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each point, in place of the file's.", show_default=False)
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, metavar="N", help="Ranks of each run.")] = 1,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at the same time. [dim]\\[default: as many as GPUs, or else cores, are enough for][/dim]",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Train a configuration with every combination of some values, with several seeds, and compare the results.

    Each run is a process with a folder of its own, and its output in OUT/NAME.log. A run that fails does not end the
    sweep; the same command goes on with what is missing. Writes OUT/results.csv (and .parquet, where pyarrow is
    installed) with a line for each run and set, and OUT/sweep.html with the table and plots.
    """
    from ..machine import gpus, usable_cores
    from ..sweep import largest_at_once, perform, read_sweep

    found = read_sweep(file, overrides or [], seeds)
    out = out or Path("runs") / file.stem
    count = gpus()
    most = largest_at_once(nproc, count, usable_cores())
    if at_once is not None and count:
        at_once = min(at_once, most)  # each has GPUs of its own

    def tell(done: int, total: int, outcome: "Outcome") -> None:
        if outcome.error is not None:
            warn(f"{outcome.run.name} failed: {outcome.error}")
        else:
            print(f"run        {done:,}/{total:,}  {outcome.run.name}  {outcome.done['seconds']:,.0f} s", flush=True)

    outcomes = perform(found, out, ranks=nproc, at_once=at_once or most, gpus=count, tell=tell)
    failed = [(outcome.run.name, outcome.error) for outcome in outcomes if outcome.error is not None]
    _write(out, found, outcomes, failed)
    return int(bool(failed))


def _write(out: Path, found: "Sweep", outcomes: "list[Outcome]", failed: list[tuple[str, str]]) -> None:
    """The results of what is done: printed, and into ``out``."""
    from importlib.util import find_spec

    from ...engine.report import sweep as report

    rows = [
        row
        for outcome in outcomes
        if "seconds" in outcome.done
        for row in report.rows_of_run(out / outcome.run.name, outcome.run.point, outcome.run.seed, outcome.done)
    ]
    if rows:
        shown = report.shown_figures(rows, found.figures)
        report.write_rows(out / "results.csv", rows)
        if find_spec("pyarrow") is not None:
            report.write_rows(out / "results.parquet", rows)
        report.write_page(out / "sweep.html", rows, found.axes, shown, found.against, failed)
        lines = report.table(rows, found.axes, shown, found.against)
        print()
        print_table(lines[0], lines[1:], whole=True)
        print(f"\nreport     {out / 'sweep.html'}")
    if failed:
        warn(f"{len(failed):,} of {len(outcomes):,} runs failed: give the command again to go on with them")
