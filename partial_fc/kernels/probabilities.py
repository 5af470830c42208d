"""p = exp(scale·z) without the shift by the largest logit: what the kernels that walk over blocks share, and the memory
in which p is kept between the forward pass and the row update.

p = exp(scale·z) needs no shift up to scale 64: float32 holds exp(±64), and the sum of 10¹⁰ of them. So one pass over
the rows gives Σ p and U = Σ p·ŵ, and with ∂ℓ/∂x̂ = scale·U/Σp the embeddings' gradient too. Larger scales take the
plain kernel.
"""

from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from . import Once, UnitGradient
from .products import ComputeDtype

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
    """The p of a step, which make the rows' gradients: ∂loss/∂ŵ = p · (coefficient·unit)."""

    def weight_unit(self, coefficient: Tensor) -> None:
        """Sets coefficient·unit [B, D], with the coefficient ∂loss/∂z / p, float64 [B, 1]."""
        ...


class UnshiftedLogSumExp:
    """The parts of a ``NegativesKernel`` besides its forward pass, which saves (``Powers``, U [B, D]).

    Args:
        compute_dtype: of the products.
        scale: s, at most 64.
        ceiling: negatives with a larger cosine are left out; none when None.
        budget: the memory that kept p may take.
    """

    def __init__(self, compute_dtype: ComputeDtype, scale: float, ceiling: float | None, budget: KeepBudget) -> None:
        self.compute_dtype: ComputeDtype = compute_dtype
        self.scale = scale
        self.ceiling = ceiling
        self.budget = budget
        self.saved = Once()

    def finish(self, summed: Tensor) -> Tensor:
        return summed.log()

    def backward(self, total: Tensor, slope: Tensor) -> tuple[Tensor, Powers]:
        powers, weighted = self.saved.take()
        # ∂loss/∂z = coefficient·p; where a sample has no negative at all, p is 0 and ℓ −∞.
        coefficient = (slope * self.scale * torch.exp(-total.clamp_min(-600.0)))[:, None]
        powers.weight_unit(coefficient)
        return (coefficient * weighted.double()).to(weighted.dtype), powers
