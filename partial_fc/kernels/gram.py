"""The sum of squared cosines without a single cosine: Σ_k z_k² = x̂ᵀ G x̂ with G = Ŵᵀ Ŵ.

G [D, D] of the rank's own rows is all that the forward pass needs, and M = Σ_b c_b x̂_b x̂_bᵀ [D, D] gives all rows'
gradients at once, since Σ_b c_b z_bk x̂_b = M ŵ_k. So there is no [B, K], and the products cost 4·K·D² operations in
place of 6·B·K·D. The ranks need not exchange G: x̂ᵀ G x̂ is a sum over the ranks too.
"""

import torch
from torch import Tensor


def pays(batch: int, dim: int, rows: int) -> bool:
    """Whether this way takes fewer operations: 4·K·D² + 4·B·D² < 6·B·K·D."""
    return 2 * dim * (rows + batch) < 3 * batch * rows


class SumOfSquaresByGram:
    """q = Σ z² over the negatives; the same numbers as ``SumOfSquares``.

    Args:
        compute_dtype: of the products over the rows.
    """

    def __init__(self, compute_dtype: torch.dtype) -> None:
        self.compute_dtype = compute_dtype
        self.saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None

    def forward(self, unit: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        compute_rows = rows.to(self.compute_dtype)
        gram = (compute_rows.T @ compute_rows).to(unit.dtype)  # [D, D]
        mapped = unit @ gram  # G x̂, [B, D]
        here = (columns >= 0).nonzero()[:, 0]  # whose own class must be taken out again
        own = rows[columns[here]]
        target = (unit[here] * own).sum(dim=1, keepdim=True)  # z_y, [here, 1]
        squares = (unit.double() * mapped.double()).sum(dim=1)
        squares[here] -= target[:, 0].double().square()
        mapped[here] -= target * own
        self.saved = (unit, compute_rows, mapped, columns, target)
        return squares

    def finish(self, summed: Tensor) -> Tensor:
        return summed

    def backward(self, total: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        if self.saved is None:
            raise RuntimeError("backward through the head a second time: call the head again for another backward pass")
        (unit, rows, mapped, columns, target), self.saved = self.saved, None
        weight = (2.0 * slope).to(unit.dtype)[:, None]  # c, [B, 1]
        moment = unit.T @ (weight * unit)  # M, [D, D]
        rows_grad = (rows @ moment.to(self.compute_dtype)).to(unit.dtype)
        here = (columns >= 0).nonzero()[:, 0]
        rows_grad.index_add_(0, columns[here], -(weight[here] * target) * unit[here])
        return weight * mapped, rows_grad
