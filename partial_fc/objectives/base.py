"""What every objective is made of: the numbers that it sees, a base class for each reduction, and functions."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import device
from ..kernels import KernelSetup, NegativesKernel
from ..kernels.blocked import LogSumExpBlocked, SumOfSoftplusBlocked
from ..kernels.cosines import LogSumExp, SumOfSquares
from ..kernels.gram import SumOfSquaresByGram, pays
from ..kernels.hard import HardNegatives
from ..kernels.probabilities import MAX_SCALE
from ..kernels.products import ComputeDtype, stored_dtype
from .schedules import Schedule

_LARGEST_SCALE = 256.0  # exp(±2·scale) stays inside float64, in which the ranks add their sums


@dataclass(frozen=True)
class Numbers:
    """What an objective sees of the samples of a batch: float tensors [B], one number each.

    Attributes:
        target: z_y; NaN until it is known.
        negatives: ℓ, q or Σ softplus, as the objective's reduction has it; empty until the negatives are reduced.
        norm: ‖x‖ of the embeddings as the head got them; empty unless the objective ``sees`` it.
        noise: drawn from the standard normal distribution, a function of (seed, step, place in the global batch), so
            the same on any number of ranks; zeros in evaluation; empty unless the objective ``sees`` it.
        state: the head's numbers for this objective, name → [].
    """

    target: Tensor
    negatives: Tensor = field(default_factory=lambda: torch.empty(0))
    norm: Tensor = field(default_factory=lambda: torch.empty(0))
    noise: Tensor = field(default_factory=lambda: torch.empty(0))
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def at(self, places: Tensor | slice) -> "Numbers":
        """Those of some of the samples; ``negatives`` is that of these already."""
        chosen = {name: value[places] for name in ("target", "norm", "noise") if len(value := getattr(self, name))}
        return dataclasses.replace(self, **chosen)


@dataclass(frozen=True)
class Objective(ABC):
    """Base of all objectives: frozen dataclasses, whose fields are numbers or follow the steps (``Schedule``).

    ``intra`` and ``inter`` return the loss of each sample [B].
    """

    sees: ClassVar[frozenset[Literal["norm", "noise"]]] = frozenset()
    """Which of ``Numbers`` it needs besides the target, the negatives and its state."""
    learned: ClassVar[frozenset[str]] = frozenset()
    """Which of its state is learned by gradient; the rest is what ``update`` makes of it."""

    def intra(self, of: Numbers) -> Tensor:
        """What pulls a sample to its own center."""
        return torch.zeros_like(of.target)

    @abstractmethod
    def inter(self, of: Numbers) -> Tensor:
        """What pushes it from the others."""

    def __call__(self, target: Tensor, negatives: Tensor, **others: Any) -> Tensor:
        """Loss of each sample [B]; ``others`` are further ``Numbers``."""
        of = Numbers(target, negatives, **others)
        return self.intra(of) + self.inter(of)

    def at(self, step: int) -> Self:
        """The objective of that step: every ``Schedule`` is the number that it has then."""
        moving = {
            one.name: value.at(step)
            for one in dataclasses.fields(self)
            if isinstance(value := getattr(self, one.name), Schedule)
        }
        return dataclasses.replace(self, **moving) if moving else self

    def first_state(self, num_classes: int) -> dict[str, float]:
        """Name → first value of the numbers that the head keeps for it, in checkpoints too."""
        return {}

    def update(self, of: Numbers) -> dict[str, Tensor]:
        """The state from the whole global batch, without gradient, before it is used; only what changes."""
        return {}

    @abstractmethod
    def kernel(self, setup: KernelSetup) -> NegativesKernel:
        """What reduces the negatives to the number that ``inter`` receives."""

    def fuses(self, weight: Tensor, compute_dtype: ComputeDtype) -> bool:
        """Whether ``kernel`` has a fused one for the centers ``weight`` [rows, D]: on a GPU, without the host waiting
        for it."""
        return False

    # Hard negatives, which count with another cosine.

    hard_by: ClassVar[Literal["constant", "target", "largest"]] = "constant"
    """What ``hard`` needs: nothing; z_y of the batch, one more collective of [B]; or the largest cosines among the
    negatives of all ranks, one more product and one more collective of [B, top_k + 1]."""
    top_k = 0
    """How many of them."""

    def hard(self, of: Numbers, largest: Tensor | None) -> HardNegatives | None:
        """The negatives that are transformed, or None.

        Args:
            largest: the ``top_k`` + 1 largest cosines among a sample's negatives, descending, float64 [B, top_k + 1],
                −∞ where it has fewer; None unless ``hard_by`` is "largest".
        """
        return None


@dataclass(frozen=True)
class LogSumExpObjective(Objective):
    """An objective whose ``negatives`` are ℓ = log Σ_{k≠y} exp(scale·z_k).

    With ``logit`` it is the cross-entropy softplus(ℓ − scale·logit).

    Args:
        scale: s, in (0, 256].
        filter: negatives with a cosine above it are left out, in (−1, 1]: with noisy labels they are likely the same
            identity under another name (inter-class filtering, An et al. 2022); None leaves out none.
    """

    scale: float = 64.0
    filter: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_range(self, "scale", above=0, at_most=_LARGEST_SCALE)
        if self.filter is not None:
            check_range(self, "filter", above=-1, at_most=1)

    def logit(self, of: Numbers) -> Tensor:
        """What takes the place of z_y, [B]."""
        return of.target

    def inter(self, of: Numbers) -> Tensor:
        return softplus(of.negatives - self.scale * self.logit(of))

    def hard(self, of: Numbers, largest: Tensor | None) -> HardNegatives | None:
        if self.filter is None:
            return None
        return HardNegatives.of(torch.full_like(of.target, self.filter), constant=-math.inf)

    def kernel(self, setup: KernelSetup) -> NegativesKernel:
        if setup.fused:
            from ..kernels.fused.logsumexp import LogSumExpFused  # which needs Triton

            return LogSumExpFused(setup, self.scale)
        return (LogSumExpBlocked if self.scale <= MAX_SCALE else LogSumExp)(setup, self.scale)

    def fuses(self, weight: Tensor, compute_dtype: ComputeDtype) -> bool:
        return self.scale <= MAX_SCALE and device.fits(weight, stored_dtype(compute_dtype))


@dataclass(frozen=True)
class SoftplusObjective(Objective):
    """An objective whose ``negatives`` are Σ_{k≠y} softplus(scale·g(z_k) + shift), g(z) = 2·((z + 1)/2)^power − 1.

    Each class is a question of its own, yes or no, with one number that is learned for all of them.

    Args:
        scale: in (0, 256].
        power: of g, in [1, 16]; 1 leaves the cosine as it is.
    """

    scale: float = 64.0
    power: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "scale", above=0, at_most=_LARGEST_SCALE)
        check_range(self, "power", at_least=1, at_most=16)

    @abstractmethod
    def shift(self, state: Mapping[str, Tensor]) -> Tensor:
        """What stands beside scale·g(z), [], from the head's numbers for it."""

    def adjusted(self, cosine: Tensor) -> Tensor:
        """g(z)."""
        return cosine if self.power == 1 else 2 * ((cosine + 1) / 2).clamp_min(0).pow(self.power) - 1

    def kernel(self, setup: KernelSetup) -> NegativesKernel:
        shift = self.shift(setup.state)
        if setup.fused:
            from ..kernels.fused.logsumexp import SumOfSoftplusFused

            return SumOfSoftplusFused(setup, self.scale, self.power, shift)
        return SumOfSoftplusBlocked(setup, self.scale, self.power, shift)

    def fuses(self, weight: Tensor, compute_dtype: ComputeDtype) -> bool:
        return device.fits(weight, stored_dtype(compute_dtype))


@dataclass(frozen=True)
class SquaresObjective(Objective):
    """An objective whose ``negatives`` are q = Σ_{k≠y} z_k².

    Args:
        gram: whether q comes from the Gram matrix of the centers, without any cosine (``kernels/gram.py``), or from the
            cosines; None takes what needs fewer operations. The numbers are the same.
    """

    gram: bool | None = dataclasses.field(default=None, kw_only=True)

    def kernel(self, setup: KernelSetup) -> NegativesKernel:
        gram = pays(setup.batch, setup.dim, setup.rows) if self.gram is None else self.gram
        return (SumOfSquaresByGram if gram and setup.sub_centers == 1 else SumOfSquares)(setup)


def values_of(number: "float | Schedule") -> tuple[float, ...]:
    """It, or both ends of a number that follows the steps."""
    return number.ends if isinstance(number, Schedule) else (number,)


def check_range(
    objective: Objective,
    name: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raises ValueError where a parameter of the objective lies outside its range; NaN lies outside every range."""
    for number in values_of(getattr(objective, name)):
        if not (number > above and at_least <= number <= at_most and (number < below or below == math.inf)):
            lower = f"({above:g}" if above > -math.inf else f"[{at_least:g}"
            upper = f"{at_most:g}]" if at_most < math.inf else f"{below:g})" if below < math.inf else "∞)"
            raise ValueError(f"{name} must lie in {lower}, {upper}, found {number!r}")


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), exact everywhere; torch's own cuts off above 20, an error of 2·10⁻⁹."""
    return -logsigmoid(-x)


def psi(theta: Tensor) -> Tensor:
    """ψ(t) = (−1)^j·cos t − 2j with j = ⌊t/π⌋: the cosine on [0, π], continued so that it keeps falling beyond π."""
    turns = torch.floor(theta.detach() / math.pi)
    sign = 1.0 - 2.0 * torch.remainder(turns, 2.0)
    return sign * torch.cos(theta) - 2.0 * turns


def angle(cosine: Tensor) -> Tensor:
    """arccos with a bounded slope.

    The true slope −1/sin θ is infinite at θ = 0 and π, where the gradient that it multiplies, the part of the center
    at right angles to the embedding, is zero. Below sin θ = 10⁻⁴ the slope stays at −10⁴, and the product is zero.
    """
    return _Angle.apply(cosine)  # type: ignore[return-value]


class _Angle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cosine: Tensor) -> Tensor:
        theta = torch.acos(cosine.clamp(-1.0, 1.0))
        ctx.save_for_backward(theta)
        return theta

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (theta,) = ctx.saved_tensors
        return -grad / torch.sin(theta).clamp_min(1e-4)
