"""Numbers of an objective that follow the steps: margins that grow, annealing that ends."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

Shape = Literal["linear", "exponential", "inverse"]


@dataclass(frozen=True)
class Schedule:
    """A number that goes from ``start`` to ``end`` as training goes on; steps are forward passes in training mode.

    With x = (step − first)/(last − first) in [0, 1]: "linear" start + x·(end − start); "exponential"
    start·(end/start)ˣ; "inverse" start/(1 + gamma·(step − first)), which stops at ``end``.

    Args:
        start: up to the step ``first``.
        end: from the step ``last`` on; with "inverse" from where it is reached.
        first: a step, from 0.
        last: a step after ``first``; not with "inverse".
        gamma: above 0; only with "inverse".

    Raises:
        ValueError: a number does not fit the shape.
    """

    start: float
    end: float
    shape: Shape = "linear"
    first: int = 0
    last: int | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape must be one of {', '.join(get_args(Shape))}, found {self.shape!r}")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"start and end must be finite, found {self.start} and {self.end}")
        if self.first < 0:
            raise ValueError(f"first must be a step, 0 or later, found {self.first}")
        if self.shape == "inverse":
            if self.last is not None or self.gamma is None or not self.gamma > 0:
                raise ValueError("shape inverse needs gamma above 0, and no last")
            if not 0 <= self.end <= self.start:
                raise ValueError(f"shape inverse needs 0 ≤ end ≤ start, found {self.end} and {self.start}")
            return
        if self.gamma is not None:
            raise ValueError(f"shape {self.shape} has no gamma")
        if self.last is None or self.last <= self.first:
            raise ValueError(f"shape {self.shape} needs last, a step after first ({self.first}), found {self.last}")
        if self.shape == "exponential" and not self.start * self.end > 0:
            raise ValueError(f"shape exponential needs start and end of one sign, found {self.start} and {self.end}")

    @property
    def ends(self) -> tuple[float, float]:
        """Between which all its values lie."""
        return self.start, self.end

    def at(self, step: int) -> float:
        """Its value in a step."""
        passed = max(0, step - self.first)
        if self.shape == "inverse":
            assert self.gamma is not None
            return max(self.end, self.start / (1 + self.gamma * passed))
        assert self.last is not None
        share = passed / (self.last - self.first)
        if share >= 1:
            return self.end
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** share
        return self.start + share * (self.end - self.start)

    @classmethod
    def of(cls, name: str, entries: dict[str, Any]) -> Self:
        """From what a configuration says in place of the number ``name``.

        Raises:
            ValueError: it does not fit; the text says what is allowed.
        """
        allowed = [one.name for one in fields(cls)]
        entries = {key: value for key, value in entries.items() if value is not None}
        for key, value in entries.items():
            if key not in allowed:
                raise ValueError(f"{name} has no entry {key!r}; allowed: {', '.join(allowed)}")
            if key != "shape" and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{name}.{key} must be a number, found {value!r}")
            if key in ("first", "last") and not isinstance(value, int):
                raise ValueError(f"{name}.{key} must be a step, a whole number, found {value!r}")
        for key in ("start", "end"):
            if key not in entries:
                raise ValueError(f"{name} needs {key}")
        try:
            return cls(**entries)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
