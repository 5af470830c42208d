"""What the kernels that walk over blocks share: the reductions and their slopes, and the memory in which p is kept
between the forward pass and the row update.

p = exp(scale·z) needs no shift up to scale 64: float32 holds exp(±64), and the sum of 10¹⁰ of them. So one pass over
the rows gives Σ p and U = Σ p·ŵ, and with ∂ℓ/∂x̂ = scale·U/Σp the embeddings' gradient too. Larger scales take the
plain kernel.
"""

from abc import ABC, abstractmethod
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import KernelBase, KernelSetup, UnitGradient

MAX_SCALE = 64.0


def probability_bytes(batch: int, rows: int, compute_dtype: torch.dtype) -> int:
    """What the probabilities of ``batch`` samples by ``rows`` classes take in the products' dtype."""
    return batch * rows * compute_dtype.itemsize


class KeepBudget:
    """The memory for kept probabilities: of all passes together whose gradients wait for the row update.

    Memory that was given out counts for as long as its tensor exists, so it need not be returned.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._given: list[ref[Tensor]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return KeepBudget, (self.limit,)  # a copy of the head has given out nothing

    def keep(self, unit: Tensor, rows: int, dtype: torch.dtype) -> Tensor | None:
        """Memory [rows, B] for the probabilities of ``rows`` classes by the samples ``unit`` [B, D]; None for none."""
        self._given = [one for one in self._given if one() is not None]
        used = sum(tensor.nbytes for one in self._given if (tensor := one()) is not None)
        if probability_bytes(len(unit), rows, dtype) > self.limit - used:
            return None
        memory = unit.new_empty(rows, len(unit), dtype=dtype)
        self._given.append(ref(memory))
        return memory


class Powers(UnitGradient, Protocol):
    """What a step keeps of its negatives, p or f′(z) [K, B]: ∂loss/∂ŵ = p · (coefficient·unit)."""

    unit: Tensor

    def weight_unit(self, coefficient: Tensor) -> None:
        """Sets coefficient·unit [B, D], with the coefficient ∂loss/∂z / p, float64 [B, 1]."""
        ...


class Reduction(KernelBase, ABC):
    """The parts of a ``NegativesKernel`` besides its forward pass, which saves (``Powers``, U [B, D])."""

    nearly_radial = False
    """Whether U is along x̂ but for a small part, the one that counts (``products.summed_at_once``)."""

    def __init__(self, setup: KernelSetup) -> None:
        super().__init__(setup)
        self.budget = setup.budget

    @abstractmethod
    def coefficient(self, total: Tensor, slope: Tensor) -> Tensor:
        """∂loss/∂z / p, float64 [B], from ``total`` and ∂loss/∂total."""

    def backward(self, total: Tensor, slope: Tensor) -> tuple[Tensor, Powers]:
        powers, weighted = self.saved.take()
        coefficient = self.coefficient(total, slope)[:, None]
        powers.weight_unit(coefficient)
        return (coefficient * weighted.double()).to(powers.unit.dtype), powers


class LogSumExpReduction(Reduction):
    """ℓ = log Σ exp(scale·z), with p = exp(scale·z); of hard negatives exp(scale·g(z) − shift), and g′(z) times that.

    Args:
        scale: s, at most 64.
    """

    def __init__(self, setup: KernelSetup, scale: float) -> None:
        super().__init__(setup)
        self.scale = scale
        self.shift = None if setup.hard is None else setup.hard.shift(scale)

    def finish(self, summed: Tensor) -> Tensor:
        total = summed[0].log()
        return total if self.shift is None else total + self.shift

    def coefficient(self, total: Tensor, slope: Tensor) -> Tensor:
        # Where a sample has no negative at all, p is 0 and ℓ −∞.
        exponent = -total.clamp_min(-600.0)
        return slope * self.scale * torch.exp(exponent if self.shift is None else exponent + self.shift)


class SoftplusReduction(Reduction):
    """Σ softplus(x) with x = scale·g(z) + shift and g(z) = 2·((z + 1)/2)^power − 1; p = ∂softplus(x)/∂z.

    Its second sum is Σ σ(x), the slope by the shift.

    Args:
        shift: [], with its graph where a gradient by it is needed.
    """

    sums = 2
    nearly_radial = True

    def __init__(self, setup: KernelSetup, scale: float, power: float, shift: Tensor) -> None:
        super().__init__(setup)
        self.scale, self.power, self.shift = scale, power, shift
        self._shift_slopes = shift

    def finish(self, summed: Tensor) -> Tensor:
        self._shift_slopes = summed[1]
        return summed[0]

    def attach(self, total: Tensor) -> Tensor:
        return total + self._shift_slopes * (self.shift - self.shift.detach())

    def coefficient(self, total: Tensor, slope: Tensor) -> Tensor:
        return slope

    def terms(self, cosines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """softplus(x), σ(x) and ∂softplus(x)/∂z of cosines [...], in their dtype."""
        if self.power == 1:
            adjusted, slope = cosines, self.scale
        else:
            half = ((cosines + 1) / 2).clamp_min(0)
            adjusted = 2 * half.pow(self.power) - 1
            slope = half.pow(self.power - 1).mul_(self.scale * self.power)
        x = adjusted * self.scale + self.shift.detach().to(cosines.dtype)
        probability = torch.sigmoid(x)
        return -logsigmoid(-x), probability, probability * slope
