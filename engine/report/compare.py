"""Several runs on one page: their curves in one picture, what they came to, where their configurations differ."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data.errors import UsageError
from ..config.loading import flat
from ..evaluation.figures import headline, leading_of
from ..log.telemetry import clock_time
from . import figures
from .record import RunRecord, read_run
from .write import SetSection, Tile, TitledFigure, render

_NOT_COMPARED = ("run.name", "run.dir", "run.code")


@dataclass(frozen=True)
class Comparison:
    """Tables of several runs; the first row has the heads, the first column says what a row is."""

    names: list[str]
    results: list[tuple[str, ...]]
    differences: list[tuple[str, ...]]
    """Of the configurations: key, then its value in each run."""


def compare(directories: Sequence[Path]) -> tuple[Comparison, list[RunRecord]]:
    """Reads the runs.

    Raises:
        UsageError: one is no run directory, or stands there twice.
    """
    places = [path.resolve() for path in directories]
    if doubled := next((path for path, one in zip(directories, places, strict=True) if places.count(one) > 1), None):
        raise UsageError(f"{doubled} is given twice")
    runs = [read_run(path) for path in directories]
    names = _names(runs)
    kept = [{key: value for key, value in flat(run.config).items() if key not in _NOT_COMPARED} for run in runs]
    keys = dict.fromkeys(key for one in kept for key in one)
    differing = [key for key in keys if any(one.get(key) != kept[0].get(key) for one in kept)]
    differences = [("", *names), *((key, *(_told(one, key) for one in kept)) for key in differing)]
    return Comparison(names, [("", *names), *_results(runs)], differences), runs


def write_comparison(path: Path, comparison: Comparison, runs: Sequence[RunRecord]) -> None:
    """Writes the page."""
    tiles = [Tile(f"{len(runs)}", "runs"), Tile(f"{len(comparison.differences) - 1}", "keys in which they differ")]
    sections = [
        SetSection("Results", None, _curves(comparison.names, runs), rows=comparison.results),
        SetSection(
            "Configuration",
            None,
            [],
            rows=comparison.differences if len(comparison.differences) > 1 else [],
            note="" if len(comparison.differences) > 1 else "The configurations are the same.",
        ),
    ]
    subtitle = " · ".join(str(run.directory) for run in runs)
    render(path, title="Runs compared", subtitle=subtitle, tiles=tiles, sets=sections)


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Of the folders; with those above, as many as it takes, where they are alike."""
    parts = [run.directory.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _results(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """What each run came to: the leading figures of its last evaluations, and its course."""
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(name for run in runs for name in run.evaluations):
        last = [dict(headline(run.evaluations[name][-1])) if name in run.evaluations else {} for run in runs]
        for title in dict.fromkeys(title for one in last for title in one):
            rows.append((f"{title}, {name}", *(one.get(title, "–") for one in last)))
    course: list[tuple[str, str, Callable[[float], str]]] = [
        ("steps", "step", lambda value: f"{int(value):,}"),
        ("loss, last logged", "loss", lambda value: f"{value:.4f}"),
        ("images/s, median", "images_per_second", lambda value: f"{value:,.0f}"),
        ("waiting for data, median", "data_share", lambda value: f"{value:.1%}"),
        ("time", "elapsed_seconds", clock_time),
        ("skipped steps", "skipped_steps", lambda value: f"{int(value):,}"),
    ]
    for title, key, shown in course:
        values = [_summed_up(run, key, median="median" in title) for run in runs]
        if any(value is not None for value in values):
            rows.append((title, *("–" if value is None else shown(value) for value in values)))
    return rows


def _summed_up(run: RunRecord, key: str, *, median: bool) -> float | None:
    if key == "step":
        return run.metrics[-1]["step"] if run.metrics else None
    values = run.series(key)[1]
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    return float(np.median(finite)) if median else float(finite[-1])


def _curves(names: Sequence[str], runs: Sequence[RunRecord]) -> list[TitledFigure]:
    drawn = []
    for title, key, label in (
        ("Loss", "loss", "loss of the global batch"),
        ("Learning rate", "lr", "learning rate"),
        ("Speed", "images_per_second", "images/s, all ranks"),
    ):
        series = {name: run.series(key) for name, run in zip(names, runs, strict=True)}
        if series := {name: one for name, one in series.items() if np.isfinite(one[1]).any()}:
            drawn.append(TitledFigure(title, figures.overlaid(series, label)))
    for evaluated in dict.fromkeys(name for run in runs for name in run.evaluations):
        series, called = {}, ""
        for name, run in zip(names, runs, strict=True):
            lines = run.evaluations.get(evaluated, [])
            if lines:
                key, called = leading_of(lines[-1])
                points = [(line["step"], 100 * line[key]) for line in lines if line.get(key) is not None]
                series[name] = tuple(np.array(points, dtype=float).reshape(-1, 2).T)
        drawn.append(TitledFigure(f"{called}, {evaluated}", figures.overlaid(series, f"{called} (%)")))
    return drawn


def _told(config: Mapping[str, Any], key: str) -> str:
    """A value, shortened; a dash where the run has no such key."""
    text = str(config[key]) if key in config else "–"
    return text if len(text) <= 60 else f"{text[:57]}..."
