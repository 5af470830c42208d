"""Objectives that ask of every class, yes or no: SphereFace2 and UniFace."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .base import Numbers, SoftplusObjective, check_range, softplus


@dataclass(frozen=True)
class SphereFace2(SoftplusObjective):
    """λ/r·softplus(−r·(g(z_y) − m) − b) + (1 − λ)/r·Σ_k softplus(r·(g(z_k) + m) + b), g(z) = 2·((z + 1)/2)^t − 1 (Wen
    et al. 2022, equation 8, with the additive margin of its variant C).

    b is learned. It begins where the loss of equal cosines is smallest, as the authors have it.

    Args:
        scale: r, in (0, 256].
        power: t, in [1, 16].
        margin: m, in [0, 2].
        balance: λ, weight of the own class, in (0, 1).
    """

    scale: float = 40.0
    power: float = 3.0
    margin: float = 0.4
    balance: float = 0.7

    learned = frozenset({"bias"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "margin", at_least=0, at_most=2)
        check_range(self, "balance", above=0, below=1)

    def first_state(self, num_classes: int) -> dict[str, float]:
        first = self.at(0)
        odds = first.balance / ((1 - first.balance) * max(1, num_classes - 1))
        middle = 2 * 0.5**first.power - 1  # g(0)
        own, other = first.scale * (middle - first.margin), first.scale * (middle + first.margin)
        root = math.sqrt((1 - odds) ** 2 + 4 * odds * math.exp(own - other))
        return {"bias": math.log(2 * odds) - other - math.log(1 - odds + root)}

    def shift(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["bias"] + self.scale * self.margin

    def intra(self, of: Numbers) -> Tensor:
        own = self.scale * (self.adjusted(of.target) - self.margin) + of.state["bias"]
        return self.balance / self.scale * softplus(-own)

    def inter(self, of: Numbers) -> Tensor:
        return (1 - self.balance) / self.scale * of.negatives


@dataclass(frozen=True)
class UniFace(SoftplusObjective):
    """softplus(b − s·(z_y − m)) + λ·Σ_k softplus(s·z_k − b): b, one threshold for all pairs, is learned (Zhou et al.
    2023, "UniFace: unified cross-entropy loss", equation 9).

    Args:
        scale: s, in (0, 256].
        margin: m, in [0, 2].
        balance: λ, weight of the negatives, above 0; for few identities below 1.
    """

    margin: float = 0.4
    balance: float = 1.0

    learned = frozenset({"threshold"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "margin", at_least=0, at_most=2)
        check_range(self, "balance", above=0)

    def first_state(self, num_classes: int) -> dict[str, float]:
        return {"threshold": math.log(10 * num_classes)}

    def shift(self, state: Mapping[str, Tensor]) -> Tensor:
        return -state["threshold"]

    def intra(self, of: Numbers) -> Tensor:
        return softplus(of.state["threshold"] - self.scale * (self.adjusted(of.target) - self.margin))

    def inter(self, of: Numbers) -> Tensor:
        return self.balance * of.negatives
