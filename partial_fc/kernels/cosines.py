"""The plain kernels: all cosines [B, K] of a step at once. The reference of every faster one."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from . import KernelBase, KernelSetup
from .products import ComputeDtype, operand_dtype, products_in, summed_at_once
from .rows import OwnClasses, SampledRows


class _CosinesKernel(KernelBase, ABC):
    """Keeps the cosines between forward and backward; backward turns them into slopes in place."""

    def _cosines(self, unit: Tensor, rows: SampledRows, own: OwnClasses, value: float) -> Tensor:
        """z [B, K] in the dtype of ``unit``, with ``value`` in place of each sample's own class, and of all but the
        nearest row of a class."""
        dtype = operand_dtype(self.compute_dtype, unit.device)
        compute_unit, compute_rows = unit.to(dtype), rows.normalized(0, len(rows)).to(dtype)
        with products_in(self.compute_dtype, unit.device):
            cosines = (compute_unit @ compute_rows.T).to(unit.dtype)
        if len(rows):
            classes = cosines.view(len(unit), -1, self.sub_centers)
            if self.sub_centers > 1:
                every = torch.arange(self.sub_centers, device=unit.device)
                classes.masked_fill_(every != classes.argmax(dim=2, keepdim=True), value)
            # A sample whose class lives elsewhere writes back what stands in its first column.
            place = own.columns.clamp_min(0)[:, None, None].expand(-1, 1, self.sub_centers)
            here = (own.columns >= 0)[:, None, None]
            classes.scatter_(1, place, torch.where(here, value, classes.gather(1, place)))
        self.saved.keep(cosines, compute_unit, compute_rows, rows.inverse)
        return cosines

    def backward(self, total: Tensor, slope: Tensor) -> tuple[Tensor, "_Slopes"]:
        cosines, unit, rows, inverse = self.saved.take()
        slopes = self._slopes(cosines, total, slope).to(unit.dtype)
        unit_gradient = self._unit_gradient(slopes, rows).to(cosines.dtype)
        return unit_gradient, _Slopes(slopes, unit, inverse, self.compute_dtype)

    @abstractmethod
    def _slopes(self, cosines: Tensor, total: Tensor, slope: Tensor) -> Tensor:
        """∂loss/∂z [B, K] from z, in place; the other arguments are those of ``backward``."""

    def _unit_gradient(self, slopes: Tensor, rows: Tensor) -> Tensor:
        """∂loss/∂unit, float64 [B, D], from ∂loss/∂z [B, K] and the normalised rows [K, D]."""
        total = slopes.new_zeros(len(slopes), rows.shape[1], dtype=torch.float64)
        size = summed_at_once(rows.shape[1])
        with products_in(self.compute_dtype, slopes.device):
            for start in range(0, len(rows), size):
                total += slopes[:, start : start + size] @ rows[start : start + size]
        return total


class _Slopes:
    """∂loss/∂ŵ = slopesᵀ · unit, with slopes = ∂loss/∂z [B, K]."""

    needs_rows = False

    def __init__(self, slopes: Tensor, unit: Tensor, inverse: Tensor, compute_dtype: ComputeDtype) -> None:
        self.slopes, self.unit, self.inverse = slopes, unit, inverse
        self.compute_dtype: ComputeDtype = compute_dtype

    def block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        with products_in(self.compute_dtype, self.unit.device):
            gradient = self.slopes[:, start:stop].T @ self.unit
        return gradient.to(self.inverse.dtype).mul_(self.inverse[start:stop])


class LogSumExp(_CosinesKernel):
    """ℓ = log Σ exp(scale·z) over the negatives. The ranks add Σ exp(scale·z) in float64, which needs no common shift.

    Args:
        scale: s, at most 256.
    """

    def __init__(self, setup: KernelSetup, scale: float) -> None:
        super().__init__(setup)
        self.scale = scale

    def forward(self, unit: Tensor, rows: SampledRows, own: OwnClasses, *, backward: bool) -> Tensor:
        cosines = self._cosines(unit, rows, own, -torch.inf)
        if len(rows) == 0:
            return torch.zeros(1, len(unit), dtype=torch.float64, device=unit.device)
        if self.hard is not None:
            cosines = self.hard.transform(cosines.T)[0].T
        largest = cosines.amax(dim=1, keepdim=True).clamp_min(-2.0)  # −∞ where there is no negative
        total = ((cosines - largest) * self.scale).exp_().sum(dim=1, dtype=torch.float64)
        return (total * torch.exp(self.scale * largest[:, 0].double()))[None]

    def finish(self, summed: Tensor) -> Tensor:
        return summed[0].log()

    def _slopes(self, cosines: Tensor, total: Tensor, slope: Tensor) -> Tensor:
        by_cosine: Tensor | float = 1.0
        if self.hard is not None:
            cosines, by_cosine = (one.T for one in self.hard.transform(cosines.T))
        shift = total.clamp_min(-1e4).to(cosines.dtype)[:, None]  # no negative at all: exp(−∞) stays 0
        powers = cosines.mul_(self.scale).sub_(shift).exp_().mul_((slope * self.scale).to(cosines.dtype)[:, None])
        return powers.mul_(by_cosine)


class SumOfSquares(_CosinesKernel):
    """q = Σ z² over the negatives."""

    def forward(self, unit: Tensor, rows: SampledRows, own: OwnClasses, *, backward: bool) -> Tensor:
        return self._cosines(unit, rows, own, 0.0).square().sum(dim=1, dtype=torch.float64)[None]

    def _slopes(self, cosines: Tensor, total: Tensor, slope: Tensor) -> Tensor:
        return cosines.mul_((2.0 * slope).to(cosines.dtype)[:, None])
