"""``pfc watch``: how runs are getting on, live."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...data.errors import UsageError
from ..console import complete_run

if TYPE_CHECKING:
    from rich.table import Table

_STILL = 120.0  # seconds without a line after which the age stands out


def watch(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, or of several runs.", autocompletion=complete_run),
    ],
    every: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="Between looks at the files.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
) -> int:
    """Show the progress of runs in a table: loss, rate, speed, waiting, evaluations, and how old the last line is.

    It reads the runs' files, so it works for runs of other machines too, on a shared disk. Ctrl-C ends it.
    """
    from rich.console import Console
    from rich.live import Live

    folders = _folders(runs)
    console = Console()
    if once or not console.is_terminal:
        (console if console.is_terminal else Console(width=200)).print(_table(folders))
        return 0
    try:
        with Live(_table(folders), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(_table(_folders(runs)), refresh=True)
    except KeyboardInterrupt:
        return 0


def _folders(given: list[Path]) -> list[Path]:
    """Runs, and those that lie in a folder that is none."""
    found = []
    for path in given:
        if (path / "config.yaml").is_file():
            found.append(path)
            continue
        inside = sorted(file.parent for file in path.glob("*/config.yaml"))
        if not inside:
            raise UsageError(f"{path} is no run, and no folder of runs: there is no config.yaml in it")
        found += inside
    return found


def _table(folders: list[Path]) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for place, title in enumerate(
        ("run", "step", "", "loss", "lr", "images/s", "data", "time", "evaluation", "to know", "last line")
    ):
        left = place in (0, 8, 9)
        table.add_column(title, justify="left" if left else "right", no_wrap=not left)
    for folder in folders:
        table.add_row(*_row(folder))
    return table


def _row(folder: Path) -> list[Any]:
    from rich.text import Text

    from ...engine.evaluation.figures import headline
    from ...engine.log.telemetry import clock_time
    from ...engine.report.record import METRICS, read_run

    run = read_run(folder)
    last = run.metrics[-1] if run.metrics else {}
    total, step = run.setting("schedule", "steps"), last.get("step", 0)
    evaluated = "; ".join(
        f"{name} {', '.join(value for _, value in headline(lines[-1])[:2])} ({lines[-1]['step']:,})"
        for name, lines in run.evaluations.items()
    )
    notes = [
        f"{name.replace('_', ' ')} {last[name]:,}"
        for name in ("skipped_steps", "rollbacks", "checkpoints_failed", "damaged_records")
        if last.get(name)
    ]
    age = time.time() - (folder / METRICS).stat().st_mtime if last else None
    done = total is not None and step >= total
    return [
        folder.name,
        f"{step:,}" + (f"/{total:,}" if total else ""),
        f"{100 * step // total}%" if total else "",
        _number(last.get("loss"), ".4f"),
        _number(last.get("lr"), ".2g"),
        _number(last.get("images_per_second"), ",.0f"),
        _number(last.get("data_share"), ".0%"),
        clock_time(last["elapsed_seconds"]) if "elapsed_seconds" in last else "",
        evaluated,
        ", ".join(notes),
        "done" if done else "" if age is None else Text(f"{clock_time(age)} ago", "red" if age > _STILL else ""),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
