"""Which checkpoints a run has, which of them is the best, and which stay.

``checkpoints/step-00000500`` is a complete one: it got that name when all of it was on the disk. ``checkpoints/latest``
is a link to the one that was written last, ``checkpoints/best`` to the best by the configured metric.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ...data.errors import UsageError
from .metadata import read_metadata

FOLDER, STATE, CONFIG, LABELS = "checkpoints", "state.json", "config.yaml", "labels.json"
LATEST, BEST = "latest", "best"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Found:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """The counters that were saved with it.

        Raises:
            UsageError: the file is damaged.
        """
        path = self.path / STATE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read ({error}); take another checkpoint") from None
        if not isinstance(state, dict) or not state.keys() >= {"step", "position", "head_steps", "num_classes"}:
            raise UsageError(f"{path} is damaged: counters are missing; take another checkpoint")
        return state

    def shapes(self) -> Mapping[str, TensorStorageMetadata]:
        """Name → size and dtype of every tensor in it."""
        entries = read_metadata(self.path).state_dict_metadata
        return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    @property
    def written(self) -> tuple[float, int]:
        """To sort by: when it was written, as after a return to an earlier step a lower one is the later; its step."""
        return float(self.state().get("written", 0)), self.step


def name_of(step: int) -> str:
    """Of a checkpoint's directory."""
    return f"step-{step:08d}"


def find_all(run_dir: Path) -> list[Found]:
    """The complete checkpoints of a run, by step."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    names = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    found = [Found(path, int(match[1])) for path, match in names if match and (path / STATE).is_file()]
    return sorted(found, key=lambda one: one.step)


def find_latest(run_dir: Path) -> Found | None:
    """The checkpoint that the run wrote last; None where it has none."""
    named = _linked(run_dir / FOLDER / LATEST)
    return named or max(find_all(run_dir), key=lambda one: one.written, default=None)


def find(path: Path) -> Found:
    """The checkpoint at ``path``, which may be a link to one, or the latest of the run there.

    Raises:
        UsageError: there is none.
    """
    if (one := _at(path) or _linked(path)) is not None:
        return one
    if not path.exists():
        raise UsageError(f"{path}: no such run or checkpoint")
    latest = find_latest(path)
    if latest is None:
        raise UsageError(f"{path}: no complete checkpoint there; give a run's directory or its checkpoints/step-*")
    return latest


def point(folder: Path, link: str, target: str) -> None:
    """Makes ``link`` in ``folder`` name ``target`` there, in one go: at no moment is it missing or half made."""
    temporary = folder / f".{link}.partial"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, folder / link)


def _at(path: Path) -> Found | None:
    match = _NAME.fullmatch(path.name)
    return Found(path, int(match[1])) if match and (path / STATE).is_file() else None


def _linked(link: Path) -> Found | None:
    return _at(link.parent / link.readlink()) if link.is_symlink() else None


EVALUATION = "evaluation"
"""Where the counters of a checkpoint hold what was measured at its step: set → metric → value."""


@dataclass(frozen=True)
class Best:
    """What makes a checkpoint the best.

    Attributes:
        metric: a field of evaluation.jsonl.
        set: the verification set.
        mode: whether the largest or the smallest is the best.
    """

    metric: str
    set: str
    mode: Literal["max", "min"]

    def value(self, state: dict[str, Any]) -> float | None:
        """The metric in the counters of a checkpoint; None where its step was not evaluated."""
        value = state.get(EVALUATION, {}).get(self.set, {}).get(self.metric)
        return float(value) if isinstance(value, int | float) else None

    def beats(self, value: float, other: float) -> bool:
        return value > other if self.mode == "max" else value < other

    def of(self, checkpoints: Iterable[Found]) -> Found | None:
        """The best of them, the earliest of equal ones; None where none was evaluated."""
        champion, champion_value = None, 0.0
        for found in checkpoints:
            value = self.value(found.state())
            if value is not None and (champion is None or self.beats(value, champion_value)):
                champion, champion_value = found, value
        return champion


def outdated(checkpoints: Sequence[Found], keep: int, spared: Sequence[Found]) -> list[Found]:
    """Those that are neither among the ``keep`` that were written last nor spared."""
    by_time = sorted(checkpoints, key=lambda found: found.written)
    return [found for found in by_time[:-keep] if found not in spared]
