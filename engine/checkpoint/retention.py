"""Which checkpoints stay: the last few, and the best by a named metric."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .found import Found

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
