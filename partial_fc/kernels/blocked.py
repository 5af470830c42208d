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
from .rows import SampledRows

MAX_SCALE = 64.0
# Of a block of rows. On a CPU it, its product and its update stay in the cache; a GPU wants large launches.
_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 27}


def block_rows(weight: Tensor) -> int:
    """How many rows of a matrix [N, D] make a block."""
    return max(64, _BLOCK_BYTES[weight.device.type] // (weight.shape[1] * weight.element_size()))


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
        self.ceiling = ceiling
        self.keep_bytes = keep_bytes
        self.saved = Once()

    def forward(self, unit: Tensor, rows: SampledRows, columns: Tensor) -> Tensor:
        powers = _Powers(self, unit, rows, columns)
        total = torch.zeros(len(unit), dtype=torch.float64, device=unit.device)
        weighted = torch.zeros_like(unit)  # U, [B, D]
        size = block_rows(unit)
        for start in range(0, len(rows), size):
            stop = min(start + size, len(rows))
            block = rows.measure(start, stop)
            compute_block = block.to(self.compute_dtype)
            power = powers.make(start, stop, compute_block)
            total += power.sum(dim=0)
            scaled = powers.scaled(start, stop, power)
            weighted += scaled.T @ compute_block
        self.saved.keep(powers, weighted, total)
        return total

    def finish(self, summed: Tensor) -> Tensor:
        return summed.log()

    def backward(self, total: Tensor, slope: Tensor) -> tuple[Tensor, "_Powers"]:
        powers, weighted, _ = self.saved.take()
        # ∂loss/∂z = coefficient·p; where a sample has no negative at all, p is 0 and ℓ −∞.
        coefficient = (slope * self.scale * torch.exp(-total.clamp_min(-600.0)))[:, None]
        powers.weight_unit(coefficient)
        return (coefficient * weighted.double()).to(weighted.dtype), powers


class _Powers:
    """p = exp(scale·z) of the negatives, by blocks; and from it ∂loss/∂ŵ = p · (coefficient·unit).

    What is kept is p/‖w‖ [K, B], which both products with it want.
    """

    def __init__(self, kernel: LogSumExpBlocked, unit: Tensor, rows: SampledRows, columns: Tensor) -> None:
        self.kernel, self.unit, self.rows = kernel, unit, rows
        self.compute_unit = unit.to(kernel.compute_dtype).T.contiguous()  # [D, B]
        here = (columns >= 0).nonzero()[:, 0]
        self.places, order = columns[here].sort()  # each sample's own class, in the order of the rows
        self.samples = here[order]
        bytes_needed = len(rows) * len(unit) * kernel.compute_dtype.itemsize
        fits = bytes_needed <= kernel.keep_bytes
        self.kept = unit.new_empty(len(rows), len(unit), dtype=kernel.compute_dtype) if fits else None
        self.weighted_unit: Tensor | None = None

    def make(self, start: int, stop: int, compute_block: Tensor) -> Tensor:
        """p of the places [start, stop), [n, B], in the dtype of ``unit``; 0 for each sample's own class."""
        if self.kept is not None and self.kept.dtype == self.unit.dtype:  # made where it will be kept
            power = torch.mm(compute_block, self.compute_unit, out=self.kept[start:stop])
        else:
            power = (compute_block @ self.compute_unit).to(self.unit.dtype)
        power.mul_(self.rows.inverse[start:stop] * self.kernel.scale)
        if self.kernel.ceiling is not None:
            power.masked_fill_(power > self.kernel.ceiling * self.kernel.scale, -torch.inf)
        power.exp_()
        first, last = torch.searchsorted(self.places, torch.tensor([start, stop], device=power.device)).tolist()
        if last > first:
            power[self.places[first:last] - start, self.samples[first:last]] = 0.0
        return power

    def scaled(self, start: int, stop: int, power: Tensor) -> Tensor:
        """p/‖w‖ in the products' dtype, from the p that ``make`` gave; kept where that fits."""
        scaled = power.mul_(self.rows.inverse[start:stop]).to(self.kernel.compute_dtype)
        if self.kept is not None and self.kept.dtype != self.unit.dtype:
            self.kept[start:stop] = scaled
        return scaled

    def weight_unit(self, coefficient: Tensor) -> None:
        """Sets coefficient·unit [B, D], with the coefficient float64 [B, 1]."""
        self.weighted_unit = (coefficient * self.unit.double()).to(self.kernel.compute_dtype)

    def block(self, start: int, stop: int, rows: Tensor) -> Tensor:
        assert self.weighted_unit is not None
        if self.kept is not None:
            scaled = self.kept[start:stop]
        else:
            scaled = self.scaled(start, stop, self.make(start, stop, rows.to(self.kernel.compute_dtype)))
        return (scaled @ self.weighted_unit).to(rows.dtype)
