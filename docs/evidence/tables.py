"""Writes the tables and pictures of docs/evidence.md from the results that lie beside this file, one for each sweep.

python docs/evidence/tables.py                  # from the results that are here
python docs/evidence/tables.py runs/evidence    # takes those of the sweeps in that folder first, and shows its data
"""

import base64
import csv
import io
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pfc.data.records.dataset import RecordDataset
from pfc.engine.report.sweep import Row, by_seed, interval, plot, points_of, select, told, write_rows
from pfc.launch.sweep import Sweep, read_sweep

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = HERE.parent / "evidence.md"
LEADING = ("identify", "rank_1")
"""The figure of which differences are told, and that is drawn."""
FIGURES = {
    ("heldout", "accuracy"): "accuracy",
    ("heldout", "tar_at_far_1e-3"): "TAR@FAR 1e-3",
    ("identify", "rank_1"): "rank-1",
    ("identify", "tpir_at_fpir_1e-2"): "TPIR@FPIR 1e-2",
    ("hand", "accuracy"): "accuracy, handwriting",
}
COSTS = {"processor_seconds": "processor s", "peak_mib": "MiB"}
# Lines of rates.yaml that stand beside a table's own: which of its points, and how they are called.
BESIDE: dict[str, list[tuple[dict[str, str], str]]] = {
    "batch": [({"objective": "d_softmax"}, "sample_rate {head.sample_rate}")],
    "tuning": [
        ({"objective": "softmax", "head.sample_rate": "1.0"}, "softmax s 16"),
        ({"objective": "cosface", "head.sample_rate": "1.0"}, "cosface s 16 m 0.2"),
    ],
    "updates": [({"objective": "softmax", "head.sample_rate": "1.0"}, "adamw, all classes")],
    "shift": [
        ({"objective": objective, "head.sample_rate": rate}, "{objective} {head.sample_rate}, as it is")
        for objective in ("softmax", "cosface")
        for rate in ("0.1", "0.015625")
    ],
    "growing": [
        ({"objective": objective, "head.sample_rate": rate}, "{objective}, {head.sample_rate}")
        for objective in ("softmax", "d_softmax")
        for rate in ("1.0", "0.1")
    ],
    "noise": [({"head.sample_rate": "1.0"}, "clean, {objective}")],
    "tail": [
        ({"objective": objective, "head.sample_rate": "1.0"}, "10 images each, {objective}")
        for objective in ("softmax", "d_softmax")
    ],
}
# The point of rates.yaml that a point is compared with, where the sweep's own file names none.
AGAINST: dict[str, Callable[[Mapping[str, str]], dict[str, str]]] = {
    "batch": lambda point: {"objective": "d_softmax", "head.sample_rate": "1.0"},
    "shift": lambda point: dict(zip(("objective", "head.sample_rate"), point["corrected"].split(), strict=True)),
}
PICTURES = ("rates",)


def take(folder: Path) -> None:
    """Copies the results of the page's sweeps in ``folder`` here, without what no table needs; those of others stay."""
    for name in re.findall(r"<!-- table: (\w+) -->", PAGE.read_text(encoding="utf-8")):
        results = folder / name / "results.csv"
        if not results.is_file():
            continue
        axes = sweep_of(name).axes
        kept = {"set", "step", "seed", "images", "images_per_second", *axes, *COSTS}
        kept |= {f"{field}{ending}" for _, field in FIGURES for ending in ("", "_low", "_high", "_std")}
        place = HERE / f"{name}.csv"
        found: dict[tuple[str, ...], dict[str, str]] = {}
        for path in (place, results):
            if path.is_file():
                with path.open(encoding="utf-8", newline="") as file:
                    for row in csv.DictReader(file):
                        found[tuple(row[key] for key in (*axes, "seed", "set"))] = {
                            key: value for key, value in row.items() if key in kept and value
                        }

        def order(row: Mapping[str, str], axes: Mapping[str, list[str]] = axes) -> tuple[int, ...]:
            return (*(labels.index(row[axis]) for axis, labels in axes.items()), int(row["seed"]))

        write_rows(place, sorted(found.values(), key=order))


def sweep_of(name: str) -> Sweep:
    return read_sweep(ROOT / "configs" / "evidence" / f"{name}.yaml", [])


def rows_of(name: str) -> list[Row]:
    """The results of a sweep: numbers as numbers, labels as they are."""
    axes = sweep_of(name).axes
    with (HERE / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return [
            {key: value if key in ("set", *axes) else float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


class Line(NamedTuple):
    """Of a table: its labels, its results, and those that it is compared with."""

    labels: list[str]
    rows: list[Row]
    base: list[Row]


def lines_of(name: str) -> list[Line]:
    sweep, rows = sweep_of(name), rows_of(name)
    rates = rows_of("rates")
    lines = []
    for wanted, called in BESIDE.get(name, []):
        for point in points_of(select(rates, wanted), sweep_of("rates").axes):
            labels = [re.sub(r"{(.+?)}", lambda found, at=point: at[found[1]], called), *[""] * (len(sweep.axes) - 1)]
            lines.append(Line(labels, select(rates, point), []))
    for point in points_of(rows, sweep.axes):
        if name in AGAINST:
            base = select(rates, AGAINST[name](point))
        else:
            itself = all(point[axis] == label for axis, label in sweep.against.items())
            base = [] if itself else select(rows, {**point, **sweep.against})
        lines.append(Line(list(point.values()), select(rows, point), base))
    return lines


def table(name: str) -> str:
    """A sweep's table in Markdown, with what it was measured over."""
    lines = lines_of(name)
    shown = [one for one in FIGURES if any(by_seed(line.rows, *one) for line in lines)]
    compared = any(line.base for line in lines)
    heads = [axis.removeprefix("head.") for axis in sweep_of(name).axes]
    for one in shown:
        heads += [FIGURES[one], *(["difference"] if compared and one == LEADING else [])]
    cells = [[*heads, *COSTS.values()]]
    for line in lines:
        row = list(line.labels)
        for one in shown:
            values = by_seed(line.rows, *one)
            row.append(told(list(values.values())))
            if compared and one == LEADING:
                other = by_seed(line.base, *one)
                pairs = [values[seed] - other[seed] for seed in values if seed in other]
                row.append(f"{np.mean(pairs):+.4f} ± {interval(pairs):.4f}" if len(pairs) > 1 else "")
        cells.append([*row, *(f"{np.median([run[cost] for run in line.rows]):,.0f}" for cost in COSTS)])
    written = ["| " + " | ".join(row) + " |" for row in cells]
    written.insert(1, "|" + "---|" * len(cells[0]))
    seeds = sorted({len(by_seed(line.rows, *shown[0])) for line in lines})
    note = f"Mean ± standard deviation over {' to '.join(map(str, seeds))} seeds"
    if compared:
        note += "; differences of the same seeds ± half of their 95 % interval"
    widths = []
    for one in shown:
        halves = [
            (row[f"{one[1]}_high"] - row[f"{one[1]}_low"]) / 2
            for line in lines
            for row in line.rows
            if row["set"] == one[0] and f"{one[1]}_high" in row
        ]
        if halves:
            widths.append(f"{FIGURES[one]} ± {np.median(halves):.3f}")
    if widths:
        note += f". Over identities, 95 % of one run: {', '.join(widths)}"
    return "\n".join([*written, "", f"{note}."])


def picture(name: str) -> str:
    """The leading figure over the last axis, as SVG."""
    uri = plot(rows_of(name), sweep_of(name).axes, *LEADING)
    return base64.b64decode(uri.partition(",")[2]).decode()


def samples(sets: Path) -> Image.Image:
    """Ten images of two identities of each set, a row for each, of ``make evidence``'s sets."""
    names = ("print/train", "print/heldout", "print/hand", "emoji/train", "emoji/heldout")
    side = 52
    picture = Image.new("RGB", (20 * side, len(names) * side), "white")
    for row, name in enumerate(names):
        dataset = RecordDataset.open(sets / name)
        labels = dataset.labels()
        chosen = [place for label in (29, 151) for place in np.flatnonzero(labels == label)[:10].tolist()]
        for column, place in enumerate(chosen):
            with Image.open(io.BytesIO(bytes(dataset.read(place)[1]))) as image:
                picture.paste(image.resize((side - 2, side - 2), Image.Resampling.NEAREST), (column * side, row * side))
    return picture


def filled(page: str) -> str:
    """The page with its tables."""

    def fill(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n\n{table(found[1])}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    if sys.argv[1:]:
        take(Path(sys.argv[1]))
        samples(ROOT / "work" / "evidence").save(HERE.parent / "images" / "evidence-data.png", optimize=True)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for one in PICTURES:
        (HERE.parent / "images" / f"evidence-{one}.svg").write_text(picture(one), encoding="utf-8")
