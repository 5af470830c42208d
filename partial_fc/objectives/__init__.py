"""The objectives: each a small differentiable function of two numbers per sample.

With the cosine z_k between a normalised embedding and the normalised center of class k, and the label y, the head
computes for every sample

* ``target``    = z_y, and
* ``negatives`` = ℓ = log Σ_{k≠y} exp(s·z_k) for a LogSumExpObjective, q = Σ_{k≠y} z_k² for a SquaresObjective,

the sums taken over the classes of the step's sample. An objective never sees the class axis. Its loss is the sum of

* ``intra(target)``: what pulls the sample to its own center, a mean over the whole batch, and
* ``inter(target, negatives)``: what pushes it from the others, a mean over the part of the batch that meets the
  negatives (all of it unless ``batch_rate`` < 1, D-Softmax-B).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .base import LogSumExpObjective, Objective, SquaresObjective, angle, check_range, psi, softplus


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

    def inter(self, target: Tensor, negatives: Tensor) -> Tensor:
        return softplus(negatives - self.scale * (psi(self.m1 * angle(target) + self.m2) - self.m3))


@dataclass(frozen=True)
class Softmax(LogSumExpObjective):
    """Normalised softmax: −log(e^{s·z_y} / Σ_k e^{s·z_k}) = softplus(ℓ − s·z_y) (NormFace, Wang et al. 2017).

    Args:
        scale: s, in (0, 256].
    """

    def inter(self, target: Tensor, negatives: Tensor) -> Tensor:
        return softplus(negatives - self.scale * target)


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

    def inter(self, target: Tensor, negatives: Tensor) -> Tensor:
        return softplus(negatives - self.scale * (target - self.margin))


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

    def inter(self, target: Tensor, negatives: Tensor) -> Tensor:
        return softplus(negatives - self.scale * psi(angle(target) + self.margin))


@dataclass(frozen=True)
class SphereFace(LogSumExpObjective):
    """Multiplicative angular margin: softplus(ℓ − s·ψ(m·θ_y)) (Liu et al. 2017, equation 7).

    Large margins do not start from random weights, so the paper's own training mixes the plain cosine in:
    (λ·z_y + ψ(m·θ_y))/(1 + λ) with λ = max(annealing_min, annealing·(1 + annealing_gamma·step)⁻¹).

    Args:
        scale: s, in (0, 256].
        margin: m, in [1, 16]; need not be an integer.
        annealing: λ of the first step; 0, the default, mixes nothing in. The paper's training used 1000.
        annealing_gamma: how fast λ falls; 0.12 there.
        annealing_min: where λ stops; 5 there, with m = 4.
    """

    margin: float = 1.35
    annealing: float = dataclasses.field(default=0.0, kw_only=True)
    annealing_gamma: float = dataclasses.field(default=0.12, kw_only=True)
    annealing_min: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "margin", at_least=1, at_most=16)
        for name in ("annealing", "annealing_gamma", "annealing_min"):
            check_range(self, name, at_least=0)

    def at(self, step: int) -> "SphereFace":
        if self.annealing == 0:
            return self
        share = max(self.annealing_min, self.annealing / (1 + self.annealing_gamma * step))
        return dataclasses.replace(self, annealing=share, annealing_gamma=0.0, annealing_min=0.0)

    def inter(self, target: Tensor, negatives: Tensor) -> Tensor:
        """With λ = ``annealing``: that of the step comes from ``at``."""
        with_margin = psi(self.margin * angle(target))
        mixed = (self.annealing * target + with_margin) / (1 + self.annealing)
        return softplus(negatives - self.scale * mixed)


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

    def intra(self, target: Tensor) -> Tensor:
        return softplus(self.scale * (self.stop - target))

    def inter(self, target: Tensor, negatives: Tensor) -> Tensor:
        return softplus(negatives)


@dataclass(frozen=True)
class P2SGrad(SquaresObjective):
    """½ Σ_k (z_k − [k = y])² = ½ (1 − z_y)² + ½ q (Zhang et al. 2019, "P2SGrad").

    The paper gives a gradient, in which the cosine takes the place of softmax's probability: (z_k − [k = y])·∂z_k; this
    is the loss that has it. It has no hyper-parameter: ``gram`` changes only how it is computed.
    """

    def intra(self, target: Tensor) -> Tensor:
        return 0.5 * (1.0 - target).square()

    def inter(self, target: Tensor, negatives: Tensor) -> Tensor:
        return 0.5 * negatives


_BY_NAME: dict[str, type[Objective]] = {
    "softmax": Softmax,
    "cosface": CosFace,
    "arcface": ArcFace,
    "sphereface": SphereFace,
    "combined": Combined,
    "d_softmax": DSoftmax,
    "p2sgrad": P2SGrad,
}


def register(name: str, kind: type[Objective]) -> None:
    """Makes an objective of one's own known to ``build``, and so to configurations, under a name.

    Args:
        kind: a frozen dataclass whose fields are its parameters, numbers with defaults.
    """
    _BY_NAME[name] = kind


def names() -> list[str]:
    """The objectives that ``build`` knows."""
    return list(_BY_NAME)


def build(name: str, **parameters: Any) -> Objective:
    """The objective of that name, as configurations write it.

    Raises:
        ValueError: unknown name, unknown parameter, or a value outside its range; the text says what is allowed.
    """
    if name not in _BY_NAME:
        raise ValueError(f"unknown objective {name!r}; allowed: {', '.join(_BY_NAME)}")
    kind = _BY_NAME[name]
    allowed = [field.name for field in dataclasses.fields(kind) if field.init]
    for key, value in parameters.items():
        if key not in allowed:
            raise ValueError(f"{name} has no parameter {key!r}; allowed: {', '.join(allowed) or 'none'}")
        _check_type(kind, key, value)
    return kind(**parameters)


def _check_type(kind: type[Objective], name: str, value: Any) -> None:
    default = next(field.default for field in dataclasses.fields(kind) if field.name == name)
    if value is None and default is None:
        return
    if name == "gram":
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true, false or null, found {value!r}")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, found {value!r}")
