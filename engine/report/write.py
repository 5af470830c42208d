"""report.html: a run on one page that needs no other file and no network."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...data.atomic import make_folder, replacing
from ...data.errors import UsageError
from ...data.pairs.pairs import Pairs, read_pairs
from ...data.protocols.images import open_images
from ...data.protocols.table import read_protocol
from ...data.records.joint import JointDataset
from ...data.remote.mirror import RemoteOptions, address_of, known_mirror
from ..evaluation.figures import headline, leading_of, rows_of
from ..evaluation.judgement import Judgement
from ..evaluation.threshold import OperatingPoint
from ..log.telemetry import clock_time
from . import figures
from .page import PAGE
from .pictures import PairGroup, picture_groups, worst_probes
from .record import RunRecord, read_run


@dataclass(frozen=True)
class Tile:
    value: str
    label: str


@dataclass(frozen=True)
class TitledFigure:
    title: str
    uri: str


@dataclass
class SetSection:
    """One verification set at its latest evaluated step."""

    name: str
    step: int | None
    """None where it is not a run's."""
    figures: list[TitledFigure]
    groups: list[PairGroup] = field(default_factory=list)
    note: str = ""
    about: str = ""
    rows: list[tuple[str, ...]] = field(default_factory=list)
    """Of a protocol, the heads first: figure, value, and what there is of the others."""


def write_report(run_dir: Path) -> Path:
    """Writes ``run_dir/report.html`` from what the run has written so far, and returns its path.

    An earlier report is replaced. Pieces that do not exist (yet) are left out: a run that is going on, or was killed,
    has a report too.

    Raises:
        UsageError: ``run_dir`` is not a run directory.
    """
    run = read_run(Path(run_dir))
    path = run.directory / "report.html"
    render(
        path,
        title=run.setting("run", "name") or run.directory.name,
        subtitle=_subtitle(run),
        tiles=_tiles(run),
        curves=_curves(run),
        table=_table(run),
        sets=_set_sections(run),
        config=run.config_text,
    )
    return path


def write_judgements(path: Path, subtitle: str, judged: Sequence[tuple[Judgement, Sequence[Any] | None]]) -> None:
    """Writes a page of what protocols say, with their images where there are any."""
    tiles = [
        Tile(value.split(" ")[0], f"{title} on {judgement.set}")
        for judgement, _ in judged
        for title, value in headline(judgement.to_dict())[:2]
    ]
    sections = [_protocol_section(judgement, images) for judgement, images in judged]
    render(path, title="Evaluation", subtitle=subtitle, tiles=tiles, sets=sections)


def write_threshold(
    path: Path, subtitle: str, threshold: float, fmr: float, points: Sequence[OperatingPoint], told: Sequence[str]
) -> None:
    """Writes a page of what a threshold gives on the set that it was chosen on, the first, and on others."""
    chosen, others = points[0], points[1:]
    tiles = [Tile(f"{threshold:.4f}", f"threshold, a cosine, for a false match rate of {fmr:g}")]
    for point in points:
        tiles.append(Tile(f"{point.fmr:.2e}", f"false match rate on {point.name}, {point.false_matches:,} pairs"))
        tiles.append(Tile(_percent(point.fnmr), f"false non-match rate on {point.name}"))
    drawn = [TitledFigure("Rates", figures.rates_over_threshold(points, threshold))]
    if others:
        drawn.append(TitledFigure("Calibration", figures.calibration(chosen, others)))
    section = SetSection("Operating point", None, drawn, note=" · ".join(told))
    render(path, title="Threshold", subtitle=subtitle, tiles=tiles, sets=[section])


def write_review(path: Path, title: str, subtitle: str, tiles: Sequence[Tile], groups: Sequence[PairGroup]) -> None:
    """Writes a page of images side by side, to be looked at before data are changed; empty groups are left out."""
    shown = [group for group in groups if group.pairs]
    note = "" if shown else "Nothing was found."
    section = SetSection("To look at", None, [], groups=shown, note=note)
    render(path, title=title, subtitle=subtitle, tiles=tiles, sets=[section])


def render(path: Path, **parts: Any) -> None:
    """Fills the page and writes it."""
    from jinja2 import Environment

    page = Environment(autoescape=True).from_string(PAGE).render(**parts)
    make_folder(path.parent)
    with replacing(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def _subtitle(run: RunRecord) -> str:
    parts = [
        f"backbone {run.setting('backbone', 'name')}, {run.setting('backbone', 'embedding_dim')}-d",
        f"objective {run.setting('head', 'objective', 'name')}, sample rate {run.setting('head', 'sample_rate')}",
        f"precision {run.setting('precision')}",
    ]
    return " · ".join(part for part in parts if "None" not in part)


def _tiles(run: RunRecord) -> list[Tile]:
    tiles = []
    for name, lines in run.evaluations.items():
        last, untrained = lines[-1], _untrained(lines)
        leading, called = leading_of(last)
        before = "" if untrained is None or untrained is last else f"; untrained {_percent(untrained.get(leading))}"
        tiles.append(Tile(_percent(last[leading]), f"{called} on {name}{before}"))
    steps, losses = run.series("loss")
    total = run.setting("schedule", "steps")
    if len(steps):
        done = f"{int(steps[-1]):,}"
        tiles.append(Tile(done, f"steps of {total:,}" if total else "steps"))
        tiles.append(Tile(f"{losses[-1]:.4g}" if np.isfinite(losses[-1]) else "not finite", "loss, last logged"))
    identities, images = _trained_on(run)
    if identities is not None:
        tiles.append(Tile(f"{identities:,}", "training identities"))
    if images is not None:
        tiles.append(Tile(f"{images:,}", "training images"))
    _, elapsed = run.series("elapsed_seconds")
    if len(elapsed):
        tiles.append(Tile(clock_time(float(elapsed[-1])), "time, evaluation included"))
    _, speeds = run.series("images_per_second")
    if np.isfinite(speeds).any():
        tiles.append(Tile(f"{np.nanmedian(speeds):,.0f}", "images/s, median"))
    return tiles


def _trained_on(run: RunRecord) -> tuple[int | None, int | None]:
    """(identities, images) of the training set, as far as they can be told without reading all of it."""
    identities: int | None = run.setting("head", "num_classes")
    train = run.setting("data", "train")
    if isinstance(train, dict):  # generated
        return identities, (train["active"] or train["generated"]) * train["images_per_identity"]
    paths = [source["path"] for source in train] if isinstance(train, list) else [train] if train else []
    try:
        remote = RemoteOptions(**(run.setting("data", "cache") or {}))
        # Of a remote set what is here already tells enough: no server is asked.
        here = [known_mirror(address, remote) if (address := address_of(path)) else path for path in paths]
        dataset = JointDataset.open(here) if paths else None
    except UsageError:  # moved or deleted since, which takes nothing from the run
        dataset = None
    if dataset is None:
        return identities, None
    return identities or dataset.told_classes, len(dataset)


def _curves(run: RunRecord) -> list[TitledFigure]:
    curves = []
    loss, rate, speed = run.series("loss"), run.series("lr"), run.series("images_per_second")
    if np.isfinite(loss[1]).any():
        curves.append(TitledFigure("Loss", figures.loss_curve(loss)))
    if len(rate[0]):
        curves.append(TitledFigure("Learning rate", figures.rate_curve(rate)))
    leading = {}
    for name, lines in run.evaluations.items():
        field_, called = leading_of(lines[-1])
        measured = [(line["step"], line[field_]) for line in lines if field_ in line]
        leading[f"{called}, {name}"] = tuple(np.array(measured, dtype=float).T)
    if leading:
        curves.append(TitledFigure("Evaluation", figures.accuracy_curve(leading)))
    if len(speed[0]):
        curves.append(TitledFigure("Speed", figures.speed_curve(speed)))
    return curves


def _table(run: RunRecord) -> dict[str, Any] | None:
    """The last evaluation of every set of pairs, and the untrained network's below it."""
    evaluations = {name: lines for name, lines in run.evaluations.items() if "accuracy" in lines[-1]}
    if not evaluations:
        return None
    every = [line for lines in evaluations.values() for line in lines]
    rates = [key for key in dict.fromkeys(key for line in every for key in line) if key.startswith("tar_at_far_")]
    heads = ["set", "step", "accuracy", "with flip", "no flip", "AUC", "EER", "threshold"]
    heads += ["TAR at FAR " + key.removeprefix("tar_at_far_") for key in rates]
    rows = []
    for name, lines in evaluations.items():
        shown = [lines[-1]]
        untrained = _untrained(lines)
        if untrained is not None and untrained is not lines[-1]:
            shown.append(untrained)
        for line in shown:
            cells = [
                f"{name}, untrained" if line is untrained else name,
                f"{line['step']:,}",
                f"{_percent(line['accuracy'])} ± {100 * line.get('accuracy_std', 0):.2f}",
                _percent(line.get("accuracy_flip")),
                _percent(line.get("accuracy_noflip")),
                _number(line.get("auc")),
                _percent(line.get("eer")),
                _number(line.get("threshold")),
                *(_percent(line.get(key)) for key in rates),
            ]
            rows.append({"cells": cells, "untrained": line is untrained})
    return {"heads": heads, "rows": rows}


def _set_sections(run: RunRecord) -> list[SetSection]:
    sections = []
    available = _available_pairs(run)
    for name, lines in run.evaluations.items():
        last, untrained = lines[-1], _untrained(lines)
        if "accuracy" not in last:
            judgement = run.judgement(name, last["step"])
            if judgement is not None:
                before = None if untrained is last else untrained
                section = _protocol_section(judgement, _images_of(run, name, judgement), before)
                section.step = last["step"]
                sections.append(section)
            continue
        scores = run.scores(name, last["step"])
        if scores is None:
            continue
        before = None if untrained is None or untrained is last else run.scores(name, untrained["step"])
        threshold = last.get("threshold")
        section = SetSection(
            name,
            last["step"],
            [
                TitledFigure("Cosines", figures.histogram(scores, threshold)),
                TitledFigure("ROC", figures.roc(scores, before)),
            ],
        )
        pairs = available.get(name)
        if pairs is None or len(pairs.same) != len(scores.same):
            section.note = "Pictures are left out: the pairs file of the configuration is gone or has changed."
        elif threshold is not None:
            section.groups = picture_groups(pairs, scores, threshold)
        sections.append(section)
    return sections


def _protocol_section(
    judgement: Judgement, images: Sequence[Any] | None, untrained: dict[str, Any] | None = None
) -> SetSection:
    about, found = rows_of(judgement)
    rows = [("figure", "value", "95 % interval", "untrained", "impostors")]
    rows += [
        (
            one.title,
            _percent(one.value),
            "" if one.interval is None else f"{_percent(one.interval[0])} … {_percent(one.interval[1])}",
            "" if untrained is None else _percent(untrained.get(one.name)),
            "" if one.impostors is None else f"{one.impostors:,}",
        )
        for one in found
    ]
    told = [place for place in range(len(rows[0])) if any(row[place] for row in rows[1:])]
    return SetSection(
        judgement.set,
        None,
        [TitledFigure(*drawn) for drawn in figures.protocol_curves(judgement.curves)],
        groups=worst_probes(judgement, images) if images is not None else [],
        note="" if images is not None or not judgement.worst else "Pictures are left out: there are no images.",
        about=about,
        rows=[tuple(row[place] for place in told) for row in rows],
    )


def _images_of(run: RunRecord, name: str, judgement: Judgement) -> Sequence[Any] | None:
    """The images of a protocol, where its table still says what it did."""
    path = next((Path(one) for one in run.setting("evaluation", "sets") or [] if Path(one).stem == name), None)
    try:
        protocol = read_protocol(path, pairs=False) if path is not None else None
        if protocol is None or len(protocol) != judgement.counts["images"]:
            return None
        return open_images(protocol.images, protocol.folder)
    except UsageError:  # moved or deleted since: the section says so
        return None


def _available_pairs(run: RunRecord) -> dict[str, Pairs]:
    pairs = {}
    for path in run.setting("evaluation", "pairs") or []:
        try:
            read = read_pairs(path)
        except UsageError:  # moved or deleted since: the section says so
            continue
        pairs[read.name] = read
    return pairs


def _untrained(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    return lines[0] if lines[0]["step"] == 0 else None


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}\N{NO-BREAK SPACE}%"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
