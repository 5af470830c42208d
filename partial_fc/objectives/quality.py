"""Objectives that see the embedding's norm, which grows with the quality of an image: AdaFace and MagFace."""

import math
from dataclasses import dataclass

from torch import Tensor

from .base import LogSumExpObjective, Numbers, angle, check_range, psi, values_of


@dataclass(frozen=True)
class AdaFace(LogSumExpObjective):
    """Easy samples of bad quality count less, hard ones of good quality more: softplus(ℓ − s·(ψ(θ_y − m·q) − m − m·q))
    with q = (‖x‖ − μ)/(σ + 10⁻³)·h, bounded to [−1, 1] and without gradient, and θ_y − m·q not below 0 (Kim et al.
    2022, equations 10 to 12).

    μ and σ are moving averages of the mean and the standard deviation of the global batch's norms, equal on all ranks.

    Args:
        scale: s, in (0, 256].
        margin: m, in [0, 1].
        concentration: h, in (0, 10].
        momentum: weight of a batch in the averages, in (0, 1].
    """

    margin: float = 0.4
    concentration: float = 0.333
    momentum: float = 0.01

    sees = frozenset({"norm"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "margin", at_least=0, at_most=1)
        check_range(self, "concentration", above=0, at_most=10)
        check_range(self, "momentum", above=0, at_most=1)

    def first_state(self, num_classes: int) -> dict[str, float]:
        return {"norm_mean": 20.0, "norm_deviation": 100.0}

    def update(self, of: Numbers) -> dict[str, Tensor]:
        norm = of.norm.clamp(1e-3, 100.0)
        if len(norm) == 1:  # no deviation
            return {}
        found = {"norm_mean": norm.mean(), "norm_deviation": norm.std()}
        return {name: of.state[name].lerp(value, self.momentum) for name, value in found.items()}

    def logit(self, of: Numbers) -> Tensor:
        norm = of.norm.detach().clamp(1e-3, 100.0)
        quality = (norm - of.state["norm_mean"]) / (of.state["norm_deviation"] + 1e-3) * self.concentration
        quality = quality.clamp(-1.0, 1.0)
        # Closer to the center than a negative margin reaches nothing pulls, as the authors' code has it.
        theta = (angle(of.target) - self.margin * quality).clamp_min(0.0)
        return psi(theta) - self.margin * (1 + quality)


@dataclass(frozen=True)
class MagFace(LogSumExpObjective):
    """A margin that grows with the norm a = ‖x‖, which is rewarded: softplus(ℓ − s·ψ(θ_y + m(a))) + λ·(a/u² + 1/a)
    (Meng et al. 2021, equations 2 and 3). m(a) is linear from ``least_margin`` at a = l to ``most_margin`` at a = u; a
    is bounded to [l, u], and both terms have a gradient by it.

    Args:
        scale: s, in (0, 256].
        least_norm: l, above 0.
        most_norm: u, above l.
        least_margin: in radians, in [0, π].
        most_margin: in radians, in [0, π].
        regularizer: λ, at least 0.
    """

    least_norm: float = 10.0
    most_norm: float = 110.0
    least_margin: float = 0.45
    most_margin: float = 0.8
    regularizer: float = 35.0

    sees = frozenset({"norm"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "least_norm", above=0)
        check_range(self, "most_norm", above=max(values_of(self.least_norm)))
        for name in ("least_margin", "most_margin"):
            check_range(self, name, at_least=0, at_most=math.pi)
        check_range(self, "regularizer", at_least=0)

    def intra(self, of: Numbers) -> Tensor:
        norm = self._bounded(of)
        return self.regularizer * (norm / self.most_norm**2 + 1 / norm)

    def logit(self, of: Numbers) -> Tensor:
        share = (self._bounded(of) - self.least_norm) / (self.most_norm - self.least_norm)
        return psi(angle(of.target) + self.least_margin + share * (self.most_margin - self.least_margin))

    def _bounded(self, of: Numbers) -> Tensor:
        return of.norm.clamp(self.least_norm, self.most_norm)
