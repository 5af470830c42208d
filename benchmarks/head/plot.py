"""The figures of the head's benchmark as a picture."""

from collections.abc import Callable
from pathlib import Path

from .case import HeadCase, Line
from .grid import HeadResults

_COLOURS = {"pfc": "#1b6ca8", "dense": "#8a8a8a", "peer": "#d1791f"}
_MARKS = {"pfc": "o", "dense": "s", "peer": "D"}


def plot(results: HeadResults, file: Path) -> None:
    """One row for each of our lines: time of a step, how many times as fast as each baseline, and × of the floor."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    lines = [line for line in results.lines if line.case.head == "pfc" and line.rounds]
    lines.reverse()  # matplotlib counts from below
    figure = Figure(figsize=(12, 2.2 + 0.34 * max(len(lines), 2)), layout="constrained")
    panels: list[tuple[str, Callable[[Line, Line], float | None]]] = [
        ("milliseconds a step", lambda one, _: 1e3 * one.median),
        ("pfc is so many times as fast as", lambda one, ours: None if one is ours else ours.times(one)),
        ("× of the floor of our step", lambda one, ours: one.median / ours.floor),
    ]
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, value) in zip(axes, panels, strict=True):
        points: dict[str, list[tuple[float, int]]] = {name: [] for name in _COLOURS}
        for row, ours in enumerate(lines):
            for one in (ours.dense, ours.peer, ours):
                if one is not None and one.rounds and (shown := value(one, ours)) is not None:
                    points[one.case.head].append((shown, row))
        for name, places in points.items():
            if places:
                axis.scatter(*zip(*places, strict=True), color=_COLOURS[name], marker=_MARKS[name], label=name, s=42)
        axis.set_xscale("log")
        axis.set_title(title, fontsize=11)
        for side in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            side(FuncFormatter(_tick))
        axis.tick_params(axis="x", which="both", labelsize=8, length=3, pad=4)
        axis.grid(axis="x", which="both", color="#e4e4e4", linewidth=0.7)
        axis.grid(axis="y", color="#f0f0f0", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(lines)), [_row(line.case, results) for line in lines], fontsize=9)
    axes[0].set_ylim(-0.6, len(lines) - 0.4)
    for axis in axes[1:]:
        axis.axvline(1.0, color="black", linewidth=0.8)
    steps = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)]
    for axis in axes:  # to the next values that have a label, so that there are two at least
        low, high = axis.get_xlim()
        axis.set_xlim(
            max((step for step in steps if step <= low), default=low),
            min((step for step in steps if step >= high), default=high),
        )
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(file, dpi=150)


def _row(case: HeadCase, results: HeadResults) -> str:
    grid = results.grid
    sampled = f"{case.rate * case.classes:,.0f} sampled" if grid.sampled else f"rate {case.rate:.3g}"
    parts = [f"{case.classes:,} classes", sampled]
    varied = {"dim": f"D {case.dim}", "batch": f"batch {case.batch}", "ranks": f"{case.ranks} rank(s)"}
    varied |= {"precision": case.precision, "objective": case.objective}
    return ", ".join([*parts, *(text for name, text in varied.items() if len(set(getattr(grid, name))) > 1)])


def _tick(value: float, _: int) -> str:
    """Powers of ten and their doubles and fives alone, so that labels do not run into each other."""
    digits = f"{value:.6e}"
    if digits[0] not in "125" or set(digits[2:8]) != {"0"}:
        return ""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
