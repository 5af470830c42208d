"""What the runs of a sweep came to: one row a run, a table over seeds with paired differences, a page with plots."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.atomic import replacing
from ...data.errors import UsageError
from ..evaluation.figures import leading_of, title
from . import figures
from .record import read_run
from .write import SetSection, Tile, TitledFigure, render

_CONFIDENCE = 0.95
COLUMNS = ("set", "step", "seed", "seconds", "processor_seconds", "peak_mib", "images_per_second", "starts")
"""Of the results, besides axes and figures."""
Point = Mapping[str, str]
Row = dict[str, Any]
"""Of a run and one of its sets: ``set``, ``step``, ``seed``, the labels of its axes, figures, costs."""


def rows_of_run(folder: Path, point: Point, seed: int, done: Mapping[str, Any]) -> list[Row]:
    """The last evaluation of each set, with what the run cost.

    Args:
        folder: of the run.
        point: axis → label.
        done: what the sweep measured of the run: seconds, processor_seconds, peak_bytes.
    """
    run = read_run(folder)
    speed = run.series("images_per_second")[1]
    costs = {
        "seconds": done["seconds"],
        "processor_seconds": done["processor_seconds"],
        "starts": done["stopped"] + 1,
        "peak_mib": round(done["peak_bytes"] / (1 << 20)),
        "images_per_second": round(float(np.nanmedian(speed)), 1) if len(speed) else None,
    }
    return [
        {**{name: value for name, value in lines[-1].items() if _is_plain(value)}, **point, "seed": seed, **costs}
        for lines in run.evaluations.values()
    ]


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """One line for each row, as CSV or by its name as Parquet."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as partial:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(
                pyarrow.table({name: [row.get(name) for row in rows] for name in columns}), partial
            )
            return
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean, by Student's t over the seeds; not a number for one value."""
    from scipy.stats import t

    if len(values) < 2:
        return float("nan")
    return float(t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


def shown_figures(rows: Sequence[Row], wanted: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(set, field) of what a table shows: those that are wanted, else the leading one of each set."""
    sets = dict.fromkeys(row["set"] for row in rows)
    for name, fields in wanted.items():
        for field in fields:
            if not any(row["set"] == name and field in row for row in rows):
                there = dict.fromkeys(field for row in rows if row["set"] == name for field in row if title(field))
                raise UsageError(f"figures: no {field} of {name}; there are: {', '.join(there or sets)}")
    if wanted:
        return [(name, field) for name, fields in wanted.items() for field in fields]
    return [(name, leading_of(next(row for row in rows if row["set"] == name))[0]) for name in sets]


def table(
    rows: Sequence[Row],
    axes: Mapping[str, Sequence[str]],
    shown: Sequence[tuple[str, str]],
    against: Mapping[str, str],
) -> list[tuple[str, ...]]:
    """Mean ± standard deviation over the seeds of each point, and the difference to the point that it is compared with.

    The difference is that of runs of the same seed, with the 95 % interval of its mean. The first row has the heads.
    """
    heads = [*axes, "seeds"]
    for name, field in shown:
        heads.append(f"{title(field) or field}, {name}")
        if against:
            heads.append("against " + ", ".join(against.values()))
    lines: list[tuple[str, ...]] = [(*heads, "seconds", "MiB")]
    for point in points_of(rows, axes):
        cells = [*point.values()]
        mine = select(rows, point)
        cells.append(str(len({row["seed"] for row in mine})))
        for name, field in shown:
            values = by_seed(mine, name, field)
            cells.append(told(list(values.values())))
            if against:
                base = by_seed(select(rows, {**point, **against}), name, field)
                pairs = [values[seed] - base[seed] for seed in values if seed in base]
                itself = all(point[axis] == label for axis, label in against.items())
                cells.append("" if itself or not pairs else _difference(pairs))
        cells += [f"{np.median([row[cost] for row in mine]):,.0f}" for cost in ("seconds", "peak_mib")]
        lines.append(tuple(cells))
    return lines


def points_of(rows: Sequence[Row], axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """The points of which there are rows, in the order of the axes' labels."""
    there = {tuple(str(row[axis]) for axis in axes) for row in rows}
    places = {axis: {label: place for place, label in enumerate(labels)} for axis, labels in axes.items()}
    order = sorted(there, key=lambda labels: [places[axis][label] for axis, label in zip(axes, labels, strict=True)])
    return [dict(zip(axes, labels, strict=True)) for labels in order]


def select(rows: Sequence[Row], point: Point) -> list[Row]:
    """Those of a point."""
    return [row for row in rows if all(str(row[axis]) == label for axis, label in point.items())]


def by_seed(rows: Sequence[Row], name: str, field: str) -> dict[int, float]:
    """Seed → figure."""
    return {row["seed"]: row[field] for row in rows if row["set"] == name and field in row}


def told(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "–"
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def _difference(pairs: Sequence[float]) -> str:
    mean, half = float(np.mean(pairs)), interval(pairs)
    return f"{mean:+.4f}" + (f" [{mean - half:+.4f}, {mean + half:+.4f}]" if len(pairs) > 1 else "")


def plot(rows: Sequence[Row], axes: Mapping[str, Sequence[str]], name: str, field: str) -> str:
    """A figure of a set over the last axis, one line for each point of the others; data URI of an SVG."""
    *others, across = axes
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for point in points_of(rows, axes):
        values = list(by_seed(select(rows, point), name, field).values())
        if values:
            label = ", ".join(point[axis] for axis in others) or name
            place = list(axes[across]).index(point[across])
            lines.setdefault(label, []).append((place, float(np.mean(values)), interval(values)))
    return figures.with_intervals(lines, axes[across], across, title(field) or field)


def write_page(
    path: Path,
    rows: Sequence[Row],
    axes: Mapping[str, Sequence[str]],
    shown: Sequence[tuple[str, str]],
    against: Mapping[str, str],
    failed: Sequence[tuple[str, str]] = (),
) -> None:
    """The table, and a plot of every figure over the last axis, one line for each point of the others."""
    drawn = []
    for name, field in shown:
        drawn.append(TitledFigure(f"{title(field) or field}, {name}", plot(rows, axes, name, field)))
    tiles = [
        Tile(f"{len({(tuple(point.values())) for point in points_of(rows, axes)})}", "points"),
        Tile(f"{len({row['seed'] for row in rows})}", "seeds"),
        Tile(f"{len(failed)}", "runs that failed"),
    ]
    sections = [
        SetSection(
            "Results",
            None,
            drawn,
            rows=table(rows, axes, shown, against),
            note="Mean ± standard deviation over seeds; differences of the same seeds with their 95 % interval; bars "
            "are 95 % intervals of the means.",
        )
    ]
    if failed:
        sections.append(SetSection("Failed", None, [], rows=[("run", "why"), *failed]))
    render(path, title=f"Sweep: {path.parent.name}", subtitle=", ".join(axes), tiles=tiles, sets=sections)
