"""Objectives that change the cosines of hard negatives: CurricularFace, MV-Softmax and inter-top-K."""

import math
from dataclasses import dataclass

from torch import Tensor

from ..kernels.hard import HardNegatives
from .base import LogSumExpObjective, Numbers, check_range
from .margins import ArcFace, Combined


def _check_alone(objective: LogSumExpObjective) -> None:
    if objective.filter is not None:
        raise ValueError("filter must be null: this objective changes its hard negatives itself")


@dataclass(frozen=True)
class CurricularFace(ArcFace):
    """ArcFace whose hard negatives, z_k > ψ(θ_y + m), count as z_k·(t + z_k) (Huang et al. 2020, equations 7 and 8).

    t is a moving average of the global batch's mean z_y, equal on all ranks: hard negatives count little at first.

    Args:
        scale: s, in (0, 256].
        margin: m in radians, in [0, π].
        momentum: weight of a batch in the average, in (0, 1].
    """

    momentum: float = 0.01

    hard_by = "target"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alone(self)
        check_range(self, "momentum", above=0, at_most=1)

    def first_state(self, num_classes: int) -> dict[str, float]:
        return {"t": 0.0}

    def update(self, of: Numbers) -> dict[str, Tensor]:
        return {"t": of.state["t"].lerp(of.target.mean(), self.momentum)}

    def hard(self, of: Numbers, largest: Tensor | None) -> HardNegatives:
        return HardNegatives.of(self.logit(of), square=1.0, slope=of.state["t"])


@dataclass(frozen=True)
class MVSoftmax(Combined):
    """A combined margin whose hard negatives, z_k > ψ(m1·θ_y + m2) − m3, count as z_k + t or, adaptive, as
    z_k + t·(z_k + 1) (Wang et al. 2020, "Mis-classified vector guided softmax", equations 8 to 10).

    Args:
        scale: s, in (0, 256].
        m1, m2, m3: as ``Combined`` has them; 1, 0, m3 is the paper's MV-AM-Softmax, 1, m2, 0 its MV-Arc-Softmax.
        t: in [0, 1].
        adaptive: whether what is added grows with the cosine.
    """

    m3: float = 0.35
    t: float = 0.2
    adaptive: bool = True

    hard_by = "target"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alone(self)
        check_range(self, "t", at_least=0, at_most=1)

    def hard(self, of: Numbers, largest: Tensor | None) -> HardNegatives:
        return HardNegatives.of(self.logit(of), slope=1 + self.t * self.adaptive, constant=self.t)


@dataclass(frozen=True)
class InterTopK(ArcFace):
    """ArcFace whose ``top_k`` nearest negatives are brought nearer, to cos(θ_k − m′) (Zhao et al. 2021, "Multi-query
    multi-head attention pooling and inter-topK penalty for speaker verification", equation 6).

    They are the nearest ones of all ranks, among the sampled classes.

    Args:
        scale: s, in (0, 256].
        margin: m in radians, in [0, π].
        top_k: how many, at least 1.
        hard_margin: m′ in radians, in [0, π/2].
    """

    scale: float = 32.0
    margin: float = 0.2
    top_k: int = 5
    hard_margin: float = 0.06

    hard_by = "largest"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alone(self)
        check_range(self, "top_k", at_least=1, at_most=1024)
        check_range(self, "hard_margin", at_least=0, at_most=math.pi / 2)

    def hard(self, of: Numbers, largest: Tensor | None) -> HardNegatives:
        assert largest is not None
        # Between the last of them and the next one, so that a rounding hardly ever moves one across.
        threshold = (largest[:, self.top_k - 1] + largest[:, self.top_k]) / 2
        return HardNegatives.of(threshold, slope=math.cos(self.hard_margin), sine=math.sin(self.hard_margin))
