"""ℓ = log Σ exp(scale·z) in one pass over the rows, a block at a time that stays in the cache: the CPU's fast way.

The pass reads a block of stored centers once. In the cache it measures their norms, multiplies with the embeddings,
takes p = exp(scale·z), and adds to both sums that the step needs: Σ p, and U = Σ p·ŵ, from which ∂loss/∂unit follows
without a second pass, since ∂ℓ/∂x̂ = scale·U/Σp. The rows' own gradients are made block by block when the row optimizer
asks, from the p that were kept or, where these would not fit ``keep_bytes``, from the same product made again.

Counted for K rows: with p kept 6·B·K·D operations, K·D read once here and once by the optimizer, B·K written and read;
made again 8·B·K·D, and nothing of size B·K anywhere.

p needs no shift up to scale 64: float32 holds exp(±64), and the sum of 10¹⁰ of them. Larger scales take the plain
kernel.
"""

import torch
from torch import Tensor

from . import Once
from .exponentials import exponentials
from .keeping import keeps_probabilities
from .products import operand_dtype, products_in
from .rows import OwnClasses, SampledRows

MAX_SCALE = 64.0
# Of a block of rows. On a CPU it, its product and its update stay in the cache; a GPU wants large launches.
_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 27}


def block_rows(weight: Tensor) -> int:
    """How many rows of a matrix [N, D] make a block."""
    return max(64, _block_bytes(weight) // (weight.shape[1] * weight.element_size()))


def _block_bytes(weight: Tensor) -> int:
    # On a CPU every thread has a cache of its own, and too small a block is not worth waking them.
    return _BLOCK_BYTES[weight.device.type] * (torch.get_num_threads() if weight.device.type == "cpu" else 1)


class LogSumExpBlocked:
    """The same numbers as ``cosines.LogSumExp``.

    Args:
        compute_dtype: of the products, float32, float64 or bfloat16.
        scale: s, at most 64.
        ceiling: negatives with a larger cosine are left out; none when None.
        keep_bytes: the most memory that the kept p may take.
    """

    def __init__(self, compute_dtype: torch.dtype, scale: float, ceiling: float | None, keep_bytes: int) -> None:
        self.compute_dtype = compute_dtype
        self.scale = scale
        self.ceiling = torch.inf if ceiling is None else ceiling
        self.keep_bytes = keep_bytes
        self.saved = Once()

    def forward(self, unit: Tensor, rows: SampledRows, columns: Tensor, *, backward: bool) -> Tensor:
        powers = _Powers(self, unit, rows, columns, keep=backward)
        total = torch.zeros(len(unit), dtype=torch.float64, device=unit.device)
        weighted = torch.zeros_like(unit)  # U, [B, D]
        size = block_rows(unit)
        buffer = unit.new_empty(min(size, len(rows)), unit.shape[1]) if rows.index is not None else None
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

    def finish(self, summed: Tensor) -> Tensor:
        return summed.log()

    def backward(self, total: Tensor, slope: Tensor) -> tuple[Tensor, "_Powers"]:
        powers, weighted = self.saved.take()
        # ∂loss/∂z = coefficient·p; where a sample has no negative at all, p is 0 and ℓ −∞.
        coefficient = (slope * self.scale * torch.exp(-total.clamp_min(-600.0)))[:, None]
        powers.weight_unit(coefficient)
        return (coefficient * weighted.double()).to(weighted.dtype), powers


class _Powers:
    """p/‖w‖ [K, B] of the negatives, by blocks; and from it (∂loss/∂ŵ)/‖w‖ = p/‖w‖ · (coefficient·unit)."""

    def __init__(
        self, kernel: LogSumExpBlocked, unit: Tensor, rows: SampledRows, columns: Tensor, *, keep: bool
    ) -> None:
        self.kernel, self.unit, self.rows = kernel, unit, rows
        self.dtype = operand_dtype(kernel.compute_dtype, unit.device)
        self.columns = unit.to(self.dtype).T.contiguous()  # [D, B]
        here = (columns >= 0).nonzero()[:, 0]
        self.own = OwnClasses(columns[here])
        self.samples = here[self.own.order]
        fits = keep and keeps_probabilities(len(unit), len(rows), self.dtype, kernel.keep_bytes)
        size = min(block_rows(unit), len(rows))
        self.kept = unit.new_empty(len(rows), len(unit), dtype=self.dtype) if fits else None
        self.needs_rows = not fits
        in_place = fits and self.dtype == unit.dtype
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
        with products_in(self.kernel.compute_dtype, self.unit.device):
            if products.dtype == self.dtype:
                torch.mm(block, self.columns, out=products)
            else:
                products.copy_(block @ self.columns)
        here = self.own.within(start, stop)
        own = None if here is None else (self.own.places[here] - start, self.samples[here])
        exponentials(products, self.rows.inverse[start:stop], self.kernel.scale, self.kernel.ceiling, own, total)
        if kept is None or kept is products:
            return products.to(self.dtype)
        return kept.copy_(products)

    def weight_unit(self, coefficient: Tensor) -> None:
        """Sets coefficient·unit [B, D], with the coefficient float64 [B, 1]."""
        self.weighted_unit = (coefficient * self.unit.double()).to(self.dtype)

    def block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        assert self.weighted_unit is not None
        if self.kept is not None:
            power = self.kept[start:stop]
        else:
            assert rows is not None
            power = self.make(start, stop, rows.to(self.dtype), torch.zeros_like(self.unit[:, 0], dtype=torch.float64))
        small = stop - start <= len(self.gradients)
        with products_in(self.kernel.compute_dtype, self.unit.device):
            product = torch.mm(power, self.weighted_unit, out=self.gradients[: stop - start] if small else None)
        return product.to(self.unit.dtype)
