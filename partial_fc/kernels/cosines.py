"""The kernels that hold all cosines [B, K] of a step."""

import torch
from torch import Tensor


class _CosinesKernel:
    """Keeps the cosines between forward and backward; backward turns them into slopes in place.

    Args:
        compute_dtype: of the three matrix products.
    """

    def __init__(self, compute_dtype: torch.dtype) -> None:
        self.compute_dtype = compute_dtype
        self.saved: tuple[Tensor, Tensor, Tensor] | None = None

    def _cosines(self, unit: Tensor, rows: Tensor, columns: Tensor, own: float) -> Tensor:
        """z [B, K] in the dtype of ``unit``, with the value ``own`` in place of each sample's own class."""
        compute_unit, compute_rows = unit.to(self.compute_dtype), rows.to(self.compute_dtype)
        cosines = (compute_unit @ compute_rows.T).to(unit.dtype)
        if len(rows):
            # A sample whose class lives elsewhere writes back what stands in its first column.
            place = columns.clamp_min(0)[:, None]
            here = (columns >= 0)[:, None]
            cosines.scatter_(1, place, torch.where(here, own, cosines.gather(1, place)))
        self.saved = (cosines, compute_unit, compute_rows)
        return cosines

    def _take(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.saved is None:
            raise RuntimeError("backward through the head a second time: call the head again for another backward pass")
        saved, self.saved = self.saved, None
        return saved

    def _products(self, slopes: Tensor, unit: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        dtype = slopes.dtype
        slopes = slopes.to(self.compute_dtype)
        return (slopes @ rows).to(dtype), (slopes.T @ unit).to(dtype)


class LogSumExp(_CosinesKernel):
    """ℓ = log Σ exp(scale·z) over the negatives. The ranks add Σ exp(scale·z) in float64, which needs no common shift.

    Args:
        scale: s, at most 256.
        ceiling: negatives with a larger cosine are left out (inter-class filtering); none when None.
    """

    def __init__(self, compute_dtype: torch.dtype, scale: float, ceiling: float | None) -> None:
        super().__init__(compute_dtype)
        self.scale = scale
        self.ceiling = ceiling

    def forward(self, unit: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        cosines = self._cosines(unit, rows, columns, -torch.inf)
        if self.ceiling is not None:
            cosines.masked_fill_(cosines > self.ceiling, -torch.inf)
        if len(rows) == 0:
            return torch.zeros(len(unit), dtype=torch.float64, device=unit.device)
        largest = cosines.amax(dim=1, keepdim=True).clamp_min(-2.0)  # −∞ where there is no negative
        total = ((cosines - largest) * self.scale).exp_().sum(dim=1, dtype=torch.float64)
        return total * torch.exp(self.scale * largest[:, 0].double())

    def finish(self, summed: Tensor) -> Tensor:
        return summed.log()

    def backward(self, total: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        cosines, unit, rows = self._take()
        shift = total.clamp_min(-1e4).to(cosines.dtype)[:, None]  # no negative at all: exp(−∞) stays 0
        slopes = cosines.mul_(self.scale).sub_(shift).exp_().mul_((slope * self.scale).to(cosines.dtype)[:, None])
        return self._products(slopes, unit, rows)


class SumOfSquares(_CosinesKernel):
    """q = Σ z² over the negatives."""

    def forward(self, unit: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self._cosines(unit, rows, columns, 0.0).square().sum(dim=1, dtype=torch.float64)

    def finish(self, summed: Tensor) -> Tensor:
        return summed

    def backward(self, total: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        cosines, unit, rows = self._take()
        return self._products(cosines.mul_((2.0 * slope).to(cosines.dtype)[:, None]), unit, rows)
