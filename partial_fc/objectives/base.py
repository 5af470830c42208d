"""What every objective is made of: the base classes, and three functions, exact and with slopes that stay finite."""

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import device
from ..kernels import NegativesKernel
from ..kernels.blocked import LogSumExpBlocked
from ..kernels.cosines import LogSumExp, SumOfSquares
from ..kernels.gram import SumOfSquaresByGram, pays
from ..kernels.probabilities import MAX_SCALE, KeepBudget
from ..kernels.products import ComputeDtype, stored_dtype

if TYPE_CHECKING:
    from ..kernels.fused.logsumexp import LogSumExpFused

_LARGEST_SCALE = 256.0  # exp(±2·scale) stays inside float64, in which the ranks add their sums


@dataclass(frozen=True)
class Objective(ABC):
    """Base of all objectives. ``target`` and ``negatives`` are float tensors [B]; so is what both methods return."""

    def intra(self, target: Tensor) -> Tensor:
        return torch.zeros_like(target)

    @abstractmethod
    def inter(self, target: Tensor, negatives: Tensor) -> Tensor: ...

    def __call__(self, target: Tensor, negatives: Tensor) -> Tensor:
        """Loss of each sample [B]."""
        return self.intra(target) + self.inter(target, negatives)

    def at(self, step: int) -> "Objective":
        """The objective of that step, for those that change as training goes on."""
        return self

    @abstractmethod
    def kernel(
        self, batch: int, dim: int, rows: int, compute_dtype: ComputeDtype, budget: KeepBudget
    ) -> NegativesKernel:
        """What reduces the negatives to the number that ``inter`` receives, for a step of B × D by K rows.

        It may keep what ``budget`` has left between the forward pass and the row update, to save a product.
        """

    def fused_kernel(self, weight: Tensor, compute_dtype: ComputeDtype, budget: KeepBudget) -> "LogSumExpFused | None":
        """The same for the centers ``weight`` [rows, D] on a GPU, without host synchronisation; None for none."""
        return None


@dataclass(frozen=True)
class LogSumExpObjective(Objective):
    """An objective whose ``negatives`` are ℓ = log Σ_{k≠y} exp(scale·z_k).

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

    def kernel(
        self, batch: int, dim: int, rows: int, compute_dtype: ComputeDtype, budget: KeepBudget
    ) -> NegativesKernel:
        if self.scale <= MAX_SCALE:
            return LogSumExpBlocked(compute_dtype, self.scale, self.filter, budget)
        return LogSumExp(compute_dtype, self.scale, self.filter)

    def fused_kernel(self, weight: Tensor, compute_dtype: ComputeDtype, budget: KeepBudget) -> "LogSumExpFused | None":
        if self.scale > MAX_SCALE or not device.fits(weight, stored_dtype(compute_dtype)):
            return None
        from ..kernels.fused.logsumexp import LogSumExpFused  # which needs Triton

        return LogSumExpFused(compute_dtype, self.scale, self.filter, budget)


@dataclass(frozen=True)
class SquaresObjective(Objective):
    """An objective whose ``negatives`` are q = Σ_{k≠y} z_k².

    Args:
        gram: whether q comes from the Gram matrix of the centers, without any cosine (``kernels/gram.py``), or from the
            cosines; None takes what needs fewer operations. The numbers are the same.
    """

    gram: bool | None = dataclasses.field(default=None, kw_only=True)

    def kernel(
        self, batch: int, dim: int, rows: int, compute_dtype: ComputeDtype, budget: KeepBudget
    ) -> NegativesKernel:
        gram = pays(batch, dim, rows) if self.gram is None else self.gram
        return SumOfSquaresByGram(compute_dtype) if gram else SumOfSquares(compute_dtype)


def check_range(
    objective: Objective,
    name: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> None:
    """Raises ValueError where a parameter of the objective lies outside its range; NaN lies outside every range."""
    value = getattr(objective, name)
    if not (value > above and at_least <= value <= at_most):
        lower = f"({above:g}" if above > -math.inf else f"[{at_least:g}"
        raise ValueError(f"{name} must lie in {lower}, {at_most:g}], found {value!r}")


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
