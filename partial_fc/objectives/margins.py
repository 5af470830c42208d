"""Softmax and its margins, D-Softmax and P2SGrad: functions of z_y and of the negatives alone."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import LogSumExpObjective, Numbers, SquaresObjective, angle, check_range, psi, softplus


@dataclass(frozen=True)
class Combined(LogSumExpObjective):
    """All three margins: softplus(ℓ − s·(ψ(m1·θ_y + m2) − m3)), with θ_y = arccos z_y.

    The combined margin of ArcFace (Deng et al. 2019, equation 4), with ψ in place of the cosine so that the target's
    logit falls monotonically beyond π too.

    Args:
        scale: s, in (0, 256].
        m1: SphereFace's multiplicative margin, in (0, 16]. Below 1 it lowers the angle, and m2 or m3 goes with it: the
            ArcFace paper's own combinations are (m1, m2, m3) = (1, 0.3, 0.2) and (0.9, 0.4, 0.15).
        m2: ArcFace's additive angular margin in radians, in [0, π].
        m3: CosFace's additive cosine margin, in [0, 2].
    """

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "m1", above=0, at_most=16)
        check_range(self, "m2", at_least=0, at_most=math.pi)
        check_range(self, "m3", at_least=0, at_most=2)

    def logit(self, of: Numbers) -> Tensor:
        return psi(self.m1 * angle(of.target) + self.m2) - self.m3


@dataclass(frozen=True)
class Softmax(LogSumExpObjective):
    """Normalised softmax: −log(e^{s·z_y} / Σ_k e^{s·z_k}) = softplus(ℓ − s·z_y) (NormFace, Wang et al. 2017).

    Args:
        scale: s, in (0, 256].
    """


@dataclass(frozen=True)
class CosFace(LogSumExpObjective):
    """Additive cosine margin: softplus(ℓ − s·(z_y − m)) (Wang et al. 2018, equation 4).

    Args:
        scale: s, in (0, 256].
        margin: m, in [0, 2]; 0.35 in the paper, 0.4 in most large runs.
    """

    margin: float = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "margin", at_least=0, at_most=2)

    def logit(self, of: Numbers) -> Tensor:
        return of.target - self.margin


@dataclass(frozen=True)
class ArcFace(LogSumExpObjective):
    """Additive angular margin: softplus(ℓ − s·ψ(θ_y + m)) (Deng et al. 2019, equation 3).

    Its slope by z_y carries the factor sin(θ_y + m)/sin θ_y, bounded as |z_y| → 1 (see ``base.angle``).

    Args:
        scale: s, in (0, 256].
        margin: m in radians, in [0, π].
    """

    margin: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "margin", at_least=0, at_most=math.pi)

    def logit(self, of: Numbers) -> Tensor:
        return psi(angle(of.target) + self.margin)


@dataclass(frozen=True)
class SphereFace(LogSumExpObjective):
    """Multiplicative angular margin: softplus(ℓ − s·ψ(m·θ_y)) (Liu et al. 2017, equation 7).

    Large margins do not start from random weights, so the paper's own training mixes the plain cosine in:
    (λ·z_y + ψ(m·θ_y))/(1 + λ), with λ = max(5, 1000/(1 + 0.12·step)) for m = 4.

    Args:
        scale: s, in (0, 256].
        margin: m, in [1, 16]; need not be an integer.
        annealing: λ, at least 0; mostly a ``Schedule``. 0, the default, mixes nothing in.
    """

    margin: float = 1.35
    annealing: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "margin", at_least=1, at_most=16)
        check_range(self, "annealing", at_least=0)

    def logit(self, of: Numbers) -> Tensor:
        with_margin = psi(self.margin * angle(of.target))
        return (self.annealing * of.target + with_margin) / (1 + self.annealing)


@dataclass(frozen=True)
class DSoftmax(LogSumExpObjective):
    """Dissected softmax: softplus(s·(d − z_y)) + softplus(ℓ) (He et al. 2020, "Softmax Dissection").

    In the paper's words log(1 + ε/e^{s·z_y}) + log(1 + Σ_{k≠y} e^{s·z_k}) with ε = e^{s·d}: d is the cosine at which
    the pull ends. The two terms are independent, so the second may use a sample of the classes (D-Softmax-K,
    ``sample_rate``) or of the batch (D-Softmax-B, ``batch_rate``).

    Args:
        scale: s, in (0, 256].
        stop: d, in [−1, 1].
    """

    scale: float = 32.0
    stop: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "stop", at_least=-1, at_most=1)

    def intra(self, of: Numbers) -> Tensor:
        return softplus(self.scale * (self.stop - of.target))

    def inter(self, of: Numbers) -> Tensor:
        return softplus(of.negatives)


@dataclass(frozen=True)
class P2SGrad(SquaresObjective):
    """½ Σ_k (z_k − [k = y])² = ½ (1 − z_y)² + ½ q (Zhang et al. 2019, "P2SGrad").

    The paper gives a gradient, in which the cosine takes the place of softmax's probability: (z_k − [k = y])·∂z_k; this
    is the loss that has it. It has no hyper-parameter: ``gram`` changes only how it is computed.
    """

    def intra(self, of: Numbers) -> Tensor:
        return 0.5 * (1.0 - of.target).square()

    def inter(self, of: Numbers) -> Tensor:
        return 0.5 * of.negatives


@dataclass(frozen=True)
class _Elastic(LogSumExpObjective):
    """A margin of its own for each sample, m_i from N(m, σ²); in evaluation m.

    Args:
        deviation: σ, in [0, 1].
        plus: whether the batch's margins are given out by z_y, the largest to the smallest.
    """

    deviation: float = 0.05
    plus: bool = False

    sees = frozenset({"noise"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "deviation", at_least=0, at_most=1)

    def margins(self, mean: float, of: Numbers) -> Tensor:
        """The samples' margins [B]."""
        noise = of.noise
        if self.plus:
            order = of.target.detach().argsort(stable=True)
            noise = torch.empty_like(noise).index_copy_(0, order, noise.sort(descending=True).values)
        return mean + self.deviation * noise


@dataclass(frozen=True)
class ElasticArcFace(_Elastic, ArcFace):
    """ArcFace with random margins: softplus(ℓ − s·ψ(θ_y + m_i)) (Boutros et al. 2022, "ElasticFace", equation 6).

    Args:
        scale: s, in (0, 256].
        margin: m in radians, in [0, π].
        deviation: σ; 0.05 in the paper, 0.0175 with ``plus``.
        plus: "ElasticFace-Arc+".
    """

    def logit(self, of: Numbers) -> Tensor:
        return psi(angle(of.target) + self.margins(self.margin, of))


@dataclass(frozen=True)
class ElasticCosFace(_Elastic, CosFace):
    """CosFace with random margins: softplus(ℓ − s·(z_y − m_i)) (Boutros et al. 2022, "ElasticFace", equation 7).

    Args:
        scale: s, in (0, 256].
        margin: m, in [0, 2].
        deviation: σ; 0.05 in the paper, 0.025 with ``plus``.
        plus: "ElasticFace-Cos+".
    """

    def logit(self, of: Numbers) -> Tensor:
        return of.target - self.margins(self.margin, of)
