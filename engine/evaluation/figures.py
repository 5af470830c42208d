"""What the figures of an evaluation are called, and which lead."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .judgement import Judgement

_TITLES = {
    "accuracy": "accuracy",
    "rank_1": "rank-1",
    "cmc_1": "rank-1",
    "recall_at_1": "Recall@1",
    "map": "mAP",
    "map_at_r": "MAP@R",
    "r_precision": "R-precision",
    "minp": "mINP",
    "auc": "AUC",
    "eer": "EER",
    "min_dcf": "minDCF(0.01)",
}
_PREFIXES = {
    "tpir_at_fpir_": "TPIR@FPIR ",
    "tar_at_far_": "TAR@FAR ",
    "rank_1_with_": "rank-1, ",
    "rank_": "rank-",
    "cmc_": "rank-",
    "recall_at_": "Recall@",
}
_LEADING = ("accuracy", "rank_1", "cmc_1", "recall_at_1", "tpir_at_fpir_1e-2", "tpir_at_fpir_1e-1", "map", "map_at_r")


def title(name: str) -> str | None:
    """What a person calls the figure; None where the field of evaluation.jsonl is none."""
    if name in _TITLES:
        return _TITLES[name]
    if name.endswith(("_low", "_high", "_std")):
        return None
    for prefix, told in _PREFIXES.items():
        if name.startswith(prefix):
            return told + name.removeprefix(prefix).replace("_distractors", " distractors")
    return None


def shown(values: Mapping[str, Any], name: str) -> str:
    """A figure with its standard deviation, or the interval that it has."""
    text = f"{values[name]:.4f}"
    if f"{name}_std" in values:
        return f"{text} ± {values[f'{name}_std']:.4f}"
    if f"{name}_low" in values:
        return f"{text} [{values[f'{name}_low']:.4f}, {values[f'{name}_high']:.4f}]"
    return text


def leading_of(values: Mapping[str, Any]) -> tuple[str, str]:
    """(field, title) of the figure of a line of evaluation.jsonl that stands for it."""
    name = next((name for name in (*_LEADING, *values) if name in values and title(name)), "accuracy")
    return name, title(name) or name


def headline(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(title, value) of the figures of one line of evaluation.jsonl that say most, the leading one first."""
    names = [name for name in _LEADING if name in values]
    names += [name for name in values if name.startswith("tar_at_far_") and title(name)][-1:]
    if "accuracy" in values:
        names = ["accuracy", "eer", *names[1:]]
    names = names or [leading_of(values)[0]]
    return [(title(name) or name, shown(values, name)) for name in names]


@dataclass(frozen=True)
class Row:
    """One figure for a person; with its interval, and the impostor pairs that its rate allows, where it has them."""

    name: str
    title: str
    value: float
    interval: tuple[float, float] | None
    impostors: int | None


def rows_of(judgement: "Judgement") -> tuple[str, list[Row]]:
    """What a judgement is of, in words, and its figures."""
    about = [
        f"{number:,} {name.replace('non_', 'non-').replace('_', ' ')}"
        for name, number in judgement.counts.items()
        if not name.startswith("impostors_at")
    ]
    rows = [
        Row(
            name,
            title(name) or name,
            value,
            judgement.intervals.get(name),
            judgement.counts.get(name.replace("tar_at_far", "impostors_at_far")) if "tar_at_far" in name else None,
        )
        for name, value in judgement.figures.items()
    ]
    return ", ".join(about), rows
