"""ℓ = log Σ exp(scale·z) in one pass over the rows, a block at a time that stays in the cache: the CPU's fast way.

The pass reads a block of stored centers once. In the cache it measures their norms, multiplies with the embeddings,
takes p = exp(scale·z), and adds to both sums that the step needs: Σ p, and U = Σ p·ŵ, from which ∂loss/∂unit follows
without a second pass, since ∂ℓ/∂x̂ = scale·U/Σp. The rows' gradients are computed block by block in the row update,
from the stored p or, where p would not fit ``keep_bytes``, from p recomputed by the same product.

Counted for K rows: with p stored 6·B·K·D operations, K·D read once here and once by the optimizer, B·K written and
read; with p recomputed 8·B·K·D, and nothing of size B·K anywhere.
"""

import torch
from torch import Tensor

from ..device import block_bytes
from . import native
from .probabilities import UnshiftedLogSumExp
from .products import ComputeDtype, operand_dtype, products_in
from .rows import OwnClasses, SampledRows, computed_dtype


def block_rows(weight: Tensor, device: torch.device | None = None) -> int:
    """How many rows of a matrix [N, D] make a block, on the device that computes them: where they are when None."""
    return max(64, block_bytes(device or weight.device) // (weight.shape[1] * computed_dtype(weight.dtype).itemsize))


class LogSumExpBlocked(UnshiftedLogSumExp):
    """The same numbers as ``cosines.LogSumExp``; ``compute_dtype`` as the head has it."""

    def forward(self, unit: Tensor, rows: SampledRows, own: OwnClasses, *, backward: bool) -> Tensor:
        powers = _Powers(self, unit, rows, own, keep=backward)
        total = torch.zeros(len(unit), dtype=torch.float64, device=unit.device)
        weighted = torch.zeros_like(unit)  # U, [B, D]
        size = block_rows(unit)
        buffer = unit.new_empty(min(size, len(rows)), unit.shape[1]) if rows.copies else None
        for start in range(0, len(rows), size):
            stop = min(start + size, len(rows))
            block = rows.measure(start, stop, buffer).to(powers.dtype)
            power = powers.make(start, stop, block, total)
            if not backward:
                continue
            with products_in(self.compute_dtype, unit.device):
                if weighted.dtype == powers.dtype:
                    weighted.addmm_(power.T, block)
                else:
                    weighted += power.T @ block
        if backward:
            self.saved.keep(powers, weighted)
        return total


class _Powers:
    """p/‖w‖ [K, B] of the negatives, by blocks; and from it (∂loss/∂ŵ)/‖w‖ = p/‖w‖ · (coefficient·unit)."""

    def __init__(
        self, kernel: LogSumExpBlocked, unit: Tensor, rows: SampledRows, own: OwnClasses, *, keep: bool
    ) -> None:
        self.unit, self.rows, self.own = unit, rows, own
        self.compute_dtype: ComputeDtype = kernel.compute_dtype
        self.scale = kernel.scale
        self.ceiling = torch.inf if kernel.ceiling is None else kernel.ceiling
        self.dtype = operand_dtype(kernel.compute_dtype, unit.device)
        self.columns = unit.to(self.dtype).T.contiguous()  # [D, B]
        self.kept = kernel.budget.keep(unit, len(rows), self.dtype) if keep else None
        size = min(block_rows(unit), len(rows))
        self.needs_rows = self.kept is None
        in_place = self.kept is not None and self.dtype == unit.dtype
        self.scratch = None if in_place else unit.new_empty(size, len(unit))
        self.gradients = unit.new_empty(size, unit.shape[1], dtype=self.dtype)
        self.weighted_unit: Tensor | None = None

    def make(self, start: int, stop: int, block: Tensor, total: Tensor) -> Tensor:
        """p/‖w‖ of the places [start, stop), [n, B], in the products' dtype; Σ p is added to ``total`` [B].

        Args:
            block: the stored rows there [n, D], in the products' dtype.
        """
        kept = None if self.kept is None else self.kept[start:stop]
        products = kept if self.scratch is None else self.scratch[: stop - start]
        assert products is not None
        with products_in(self.compute_dtype, self.unit.device):
            if products.dtype == self.dtype:
                torch.mm(block, self.columns, out=products)
            else:
                products.copy_(block @ self.columns)
        here = self.own.within(start, stop)
        own = None if here is None else (self.own.places[here] - start, self.own.samples[here])
        _exponentials(products, self.rows.inverse[start:stop], self.scale, self.ceiling, own, total)
        if kept is None or kept is products:
            return products.to(self.dtype)
        return kept.copy_(products)

    def weight_unit(self, coefficient: Tensor) -> None:
        self.weighted_unit = (coefficient * self.unit.double()).to(self.dtype)

    def block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        assert self.weighted_unit is not None
        if self.kept is not None:
            power = self.kept[start:stop]
        else:
            assert rows is not None
            power = self.make(start, stop, rows.to(self.dtype), torch.zeros_like(self.unit[:, 0], dtype=torch.float64))
        small = stop - start <= len(self.gradients)
        with products_in(self.compute_dtype, self.unit.device):
            product = torch.mm(power, self.weighted_unit, out=self.gradients[: stop - start] if small else None)
        return product.to(self.unit.dtype)


def _exponentials(
    products: Tensor, inverse: Tensor, scale: float, ceiling: float, own: tuple[Tensor, Tensor] | None, total: Tensor
) -> None:
    """In place, from w·x̂ to p/‖w‖, and the sum of p over the rows: the one pass over the products of a block.

    Args:
        products: w·x̂ [n, B] of stored rows with normalised embeddings; p/‖w‖ when it returns, where p = exp(scale·z),
            z = w·x̂/‖w‖, and p = 0 for negatives with z > ``ceiling`` and for each sample's own class.
        inverse: 1/‖w‖ [n, 1].
        scale: at most 64, so that p needs no shift.
        ceiling: infinity where no negative is left out.
        own: the own classes' places in the block and in the batch, int64 [m] each; None where there are none.
        total: float64 [B], to which Σ p over the rows is added.
    """
    if native.supports(products):
        if own is not None:
            products[own] = -torch.inf
        native.exponentials(products, inverse, scale, ceiling, total)
        return
    products.mul_(inverse * scale)
    if ceiling < torch.inf:
        products.masked_fill_(products > ceiling * scale, -torch.inf)
    products.exp_()
    if own is not None:
        products[own] = 0.0
    total += products.sum(dim=0)
    products.mul_(inverse)
