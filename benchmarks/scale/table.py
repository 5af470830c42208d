"""The figures of a sweep as plain lines of at most 120 columns."""

from collections.abc import Callable

from ..head.case import HeadCase, Line
from ..head.memory import bytes_needed
from ..head.table import ceilings_line, shown, table
from .sweep import ScaleResults, Sweep


def report(results: ScaleResults) -> list[str]:
    """What was the same everywhere, a line for each case, measured or not, and why those that were not."""
    sweep = results.sweep
    setting = (
        f"D {sweep.dim}, batch {sweep.batch} a rank, products {sweep.precision}, {sweep.objective}, {sweep.optimizer}, "
        f"{sweep.threads} thread(s) a rank"
    )
    pace = (
        f"the fastest of {sweep.rounds} round(s) of {sweep.steps} steps; {results.free / 2**30:.1f} GiB free; a rank "
        "of a simulated world waits for no network"
    )
    columns = _columns(sweep)
    rows = [[*(show(line.case) for show in columns.values()), *_figures(line)] for line in results.lines]
    titles = [*columns, "rows used", "samples/s", "ms/step", "× dense", "× peer", "× floor", "MiB", "exchanged MiB"]
    reasons = list(dict.fromkeys(line.error for line in results.lines if line.error))
    if reasons:
        reasons.insert(0, "")
    return [setting, pace, *map(ceilings_line, results.ceilings), "", *table(titles, rows), *reasons]


def series(case: HeadCase, sweep: Sweep) -> str:
    """What a case is called, its classes left out."""
    columns = _columns(sweep)
    return ", ".join(
        text if title in ("head", "centers") else f"{title} {text}"
        for title, show in columns.items()
        if title != "classes" and (text := show(case))
    )


def _columns(sweep: Sweep) -> dict[str, Callable[[HeadCase], str]]:
    """Title → what distinguishes a case from others."""
    columns: dict[str, Callable[[HeadCase], str]] = {
        "head": lambda case: case.head,
        "classes": lambda case: f"{case.classes:,}",
    }
    if not sweep.rows:
        columns["rate"] = lambda case: f"{case.rate:.4g}"
    elif len(sweep.rows) > 1:
        columns["sampled"] = lambda case: f"{case.rate * case.classes:,.0f}"
    if sweep.simulate or len(sweep.ranks) > 1:
        columns["ranks"] = lambda case: f"{case.ranks:,}{' simulated' * case.simulated}"
    if {*sweep.storage} != {"device"} or {*sweep.center_dtype} != {"float32"}:
        columns["centers"] = lambda case: f"{case.storage} {case.center_dtype}" if case.head == "pfc" else ""
    return columns


def _figures(line: Line) -> list[str]:
    if not line.rounds:
        needed = "" if line.died else f"({bytes_needed(line.case) / 2**20:,.0f})"
        return ["", "died" if line.died else "does not fit", "", "", "", "", needed, ""]
    used = line.rounds[-1].used_rows
    ours = line.case.head == "pfc"
    baselines = (other.fastest if other is not None and other.rounds else None for other in (line.dense, line.peer))
    return [
        "" if used is None else f"{used:,}",
        f"{line.case.batch / line.fastest:,.0f}",
        f"{1e3 * line.fastest:,.1f}",
        *(shown(seconds and seconds / line.fastest) for seconds in baselines),
        f"{line.fastest / line.floor:.2f}",
        f"{line.peak_bytes / 2**20:,.0f}",
        f"{line.case.exchanged_bytes / 2**20:,.1f}" if ours else "",
    ]
