"""The figures as plain lines of at most 120 columns."""

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from ..ceilings import Ceilings
from .grid import HeadResults
from .phases import KINDS, PARTS

if TYPE_CHECKING:
    from ...engine.config import Config
    from ..step import StepFigures

_WIDTH = 120
_SHORT = {"forward": "fwd", "backward": "bwd", "products": "prod", "elementwise": "elem", "exchange": "exch"}


def report(results: HeadResults) -> list[str]:
    """All lines: what was the same everywhere, the machine's ceilings, times and memory, shares of the phases."""
    grid = results.grid
    options = {
        "D": lambda case: str(case.dim),
        "batch": lambda case: str(case.batch),
        "ranks": lambda case: str(case.ranks),
        "products": lambda case: case.precision,
        "objective": lambda case: case.objective,
    }
    asked = dict(zip(options, (grid.dim, grid.batch, grid.ranks, grid.precision, grid.objective), strict=True))
    varies = {name for name, values in asked.items() if len(set(values)) > 1} | ({"products"} if grid.peer else set())
    same = [f"{name} {values[0]}" for name, values in asked.items() if name not in varies]
    columns = {
        "head": lambda case: case.head,
        "classes": lambda case: f"{case.classes:,}",
        "sampled" if grid.sampled else "rate": lambda case: (
            f"{case.rate * case.classes:,.0f}" if grid.sampled else f"{case.rate:.4g}"
        ),
    } | {name: show for name, show in options.items() if name in varies}
    threads = f"{grid.threads} thread(s) a rank"
    setting = ", ".join([*same, threads, f"{grid.rounds} round(s) of {grid.steps} steps"])
    lines = [part for line in (setting, *map(ceilings_line, results.ceilings)) for part in wrap(line, _WIDTH)]
    measured = [line for line in results.lines if line.rounds]
    if not measured:
        return lines
    figures, shares = [], []
    for line in measured:
        first = [show(line.case) for show in columns.values()]
        seconds = line.seconds
        figures.append(
            [
                *first,
                f"{1e3 * line.median:,.1f}",
                f"{1e3 * min(seconds):,.1f}–{1e3 * max(seconds):,.1f}",
                f"{line.peak_bytes / 2**20:,.0f}",
                *(shown(value) for value in (line.times(line.dense), line.times(line.peer))),
                shown(line.memory_of(line.peer)),
                f"{line.median / line.floor:.2f}",
            ]
        )
        parts = [sum(line.phases.get(part, {}).values()) for part in PARTS]
        kinds = [sum(of_part.get(kind, 0.0) for of_part in line.phases.values()) for kind in KINDS]
        shares.append([*first, *(f"{share:.0%}" for share in (*parts, *kinds))])
    titles = [*columns, "ms/step", "spread", "peak MiB", "× dense", "× peer", "of peer's", "× floor"]
    times = table(titles, figures)
    if len(times[0]) > _WIDTH:  # where very much varies; the spread is in the JSON
        place = titles.index("spread")
        titles, *figures = ([*row[:place], *row[place + 1 :]] for row in (titles, *figures))
        times = table(titles, figures)
    phases = table([*columns, *PARTS, *KINDS], shares)
    if len(phases[0]) > _WIDTH:
        phases = table([*columns, *(_SHORT.get(name, name) for name in PARTS + KINDS)], shares)
    return [*lines, "", *times, "", *phases]


def step_report(config: "Config", figures: "Sequence[StepFigures]", ranks: int) -> list[str]:
    """The training step with each head: images a second, times, memory, shares of the phases."""
    height, width = config.data.image_size or (0, 0)
    lines = [
        f"{config.backbone.name}, input {height}×{width}, {config.head.num_classes or 0:,} classes at rate "
        f"{config.head.sample_rate:.4g}, {config.images_per_step(ranks):,} images a step, {config.precision}, "
        f"{ranks} rank(s)"
    ]
    if not figures:
        return lines
    dense = next((one for one in figures if one.head == "dense"), None)
    rows = []
    for one in figures:
        seconds, total = one.seconds, sum(one.phases.values())
        rows.append(
            [
                one.head,
                f"{one.images / one.median:,.1f}",
                f"{1e3 * one.median:,.1f}",
                f"{1e3 * min(seconds):,.1f}–{1e3 * max(seconds):,.1f}",
                f"{one.peak_bytes / 2**20:,.0f}",
                "" if dense is None or dense is one else f"{dense.median / one.median:.2f}",
                f"{1e3 * one.alone:,.1f}",
                *(f"{share / total:.0%}" for share in one.phases.values()),
            ]
        )
    titles = ["head", "images/s", "ms/step", "spread", "peak MiB", "× dense", "head alone ms", *figures[0].phases]
    return [*lines, "", *table([title.replace("forward", "fwd") for title in titles], rows)]


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right, as far apart as 120 columns allow."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    gap = " " * (2 if sum(widths) + 2 * (len(widths) - 1) <= _WIDTH else 1)
    return [
        gap.join(f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}" for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in (titles, *rows))
    ]


def ceilings_line(ceilings: Ceilings) -> str:
    products = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in ceilings.products.items())
    return (
        f"each of {ceilings.ranks} rank(s), all at work: products {products}, memory "
        f"{ceilings.bandwidth / 1e9:,.1f} GB/s"
    )


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"
