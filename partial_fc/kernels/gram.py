"""The sum of squared cosines without a single cosine: Σ_k z_k² = x̂ᵀ G x̂ with G = Ŵᵀ Ŵ.

G [D, D] of the rank's own rows is all that the forward pass needs, and M = Σ_b c_b x̂_b x̂_bᵀ [D, D] gives all rows'
gradients at once, since Σ_b c_b z_bk x̂_b = M ŵ_k. So there is no [B, K], and the products cost 4·K·D² operations in
place of 6·B·K·D. The ranks need not exchange G: x̂ᵀ G x̂ is a sum over the ranks too.
"""

import torch
from torch import Tensor

from . import KernelBase
from .products import ComputeDtype, operand_dtype, products_in, summed_at_once
from .rows import OwnClasses, SampledRows


def pays(batch: int, dim: int, rows: int) -> bool:
    """Whether this way takes fewer operations: 4·K·D² + 4·B·D² < 6·B·K·D."""
    return 2 * dim * (rows + batch) < 3 * batch * rows


class SumOfSquaresByGram(KernelBase):
    """q = Σ z² over the negatives; the same numbers as ``SumOfSquares``."""

    def forward(self, unit: Tensor, rows: SampledRows, own: OwnClasses, *, backward: bool) -> Tensor:
        dim = unit.shape[1]
        gram = unit.new_zeros(dim, dim, dtype=torch.float64)
        dtype, size = operand_dtype(self.compute_dtype, unit.device), summed_at_once(dim)
        with products_in(self.compute_dtype, unit.device):
            for start in range(0, len(rows), size):
                block = rows.normalized(start, min(start + size, len(rows))).to(dtype)
                gram += block.T @ block
        mapped = unit.double() @ gram  # G x̂, float64 [B, D]
        here = own.samples  # whose own class must be taken out again
        own_rows = rows.at(own.places) * rows.inverse[own.places]
        target = (unit[here] * own_rows).sum(dim=1, keepdim=True)  # z_y, [here, 1]
        squares = (unit.double() * mapped).sum(dim=1)
        squares[here] -= target[:, 0].double().square()
        mapped[here] -= target * own_rows
        self.saved.keep(unit, rows, mapped, own, target)
        return squares[None]

    def backward(self, total: Tensor, slope: Tensor) -> tuple[Tensor, "_Moment"]:
        unit, rows, mapped, own, target = self.saved.take()
        weight = (2.0 * slope).to(unit.dtype)[:, None]  # c, [B, 1]
        moment = unit.T @ (weight * unit)  # M, [D, D]
        own_slopes = -(weight[own.samples] * target) * unit[own.samples]
        return (weight * mapped).to(unit.dtype), _Moment(moment, self.compute_dtype, rows.inverse, own, own_slopes)


class _Moment:
    """∂loss/∂ŵ = M ŵ, less each sample's part in its own class."""

    needs_rows = True

    def __init__(
        self, moment: Tensor, compute_dtype: ComputeDtype, inverse: Tensor, own: OwnClasses, own_slopes: Tensor
    ) -> None:
        self.compute_dtype: ComputeDtype = compute_dtype
        self.inverse, self.own, self.own_slopes = inverse, own, own_slopes
        self.moment = moment.to(operand_dtype(compute_dtype, moment.device))

    def block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        assert rows is not None
        unit = (rows * self.inverse[start:stop]).to(self.moment.dtype)
        with products_in(self.compute_dtype, unit.device):
            gradient = (unit @ self.moment).to(rows.dtype)
        self.own.add(gradient, start, stop, self.own_slopes)
        return gradient.mul_(self.inverse[start:stop])
