"""The reductions on a GPU: the twins of those in ``blocked.py``, with the same numbers.

A block of rows is read once in float32, and normalised and rounded for the tensor cores (``rows.py``); one
product with the embeddings makes p = exp(scale·z) and its sums (``powers.py``); a second, pᵀ·ŵ, adds to U. Then
∂loss/∂ŵ = p · (coefficient·unit) is computed for a block in the row update, from p stored or recomputed. Every product
accumulates in float32. Cosines and logits are never written; p alone is, in the products' dtype.

Attention keeps its two products in one kernel. Here the sum U of a tile of 64 samples at D = 512 would take half the
registers of a multiprocessor, and each such tile would read, normalise and round all rows again, 16 times for a batch
of 1024: more than the two products cost. Written once, in blocks about as large as the cache, p costs less.

No shape depends on values on the device, so the host never waits for them. Offsets into the stored rows have 64 bits.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ...device import multiplies_to_float32, selected
from ..probabilities import LogSumExpReduction, Reduction, SoftplusReduction
from ..products import ComputeDtype, as_operand, products_in, stored_dtype
from ..rows import OwnClasses, SampledRows
from .powers import LOG2E, TILES, powers
from .rows import normalized_rows

_PAD = 64  # rows; so that a block splits evenly
# How large a block of the forward pass may be, as numbers of p or ŵ, whichever is wider: 131,072 rows at B = 1024. Each
# costs the host some tenths of a millisecond of launches, so few and large ones.
BLOCK_NUMBERS = 1 << 27


class ReductionFused(Reduction):
    """A reduction of any kind. An index of −1 stands for no row.

    Products in float32, "tf32" or bfloat16.
    """

    def forward(self, unit: Tensor, rows: SampledRows, own: OwnClasses, *, backward: bool) -> Tensor:
        with selected(unit.device):
            probabilities = FusedPowers(self, unit, rows, own, keep=backward)
            total, weighted = probabilities.sums(weighted=backward)
        if backward:
            self.saved.keep(probabilities, weighted)
        return total

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Of ``powers``, besides what every reduction has."""


class LogSumExpFused(LogSumExpReduction, ReductionFused):
    """The same numbers as ``cosines.LogSumExp``."""

    def arguments(self) -> dict[str, Any]:
        if self.hard is None or self.shift is None:
            return {"scale": self.scale}
        numbers = torch.cat([self.hard.numbers[:4], self.shift[None] * LOG2E]).float()
        return {"scale": self.scale, "threshold": self.hard.threshold.float().contiguous(), "numbers": numbers}


class SumOfSoftplusFused(SoftplusReduction, ReductionFused):
    """The same numbers as ``blocked.SumOfSoftplusBlocked``."""

    def arguments(self) -> dict[str, Any]:
        return {"scale": self.scale, "numbers": self.shift.detach().float().view(1), "power_of": self.power}


class FusedPowers:
    """p [K, B] of the negatives, by blocks; and from it ∂loss/∂ŵ = p · (coefficient·unit)."""

    needs_rows = False

    def __init__(self, kernel: ReductionFused, unit: Tensor, rows: SampledRows, own: OwnClasses, *, keep: bool) -> None:
        self.rows, self.columns = rows, own.columns.contiguous()
        self.compute_dtype: ComputeDtype = kernel.compute_dtype
        self.sums_of_each, self.arguments = kernel.sums, kernel.arguments()
        self.nearly_radial = kernel.nearly_radial
        self.dtype = stored_dtype(kernel.compute_dtype)
        self.unit = unit.contiguous()
        self.compute_unit = as_operand(self.unit, self.compute_dtype)
        self.kept = kernel.budget.keep(unit, _padded(len(rows)), self.dtype) if keep else None
        self.weighted_unit: Tensor | None = None

    def sums(self, *, weighted: bool) -> tuple[Tensor, Tensor]:
        """The sums, float64 [S, B], and U = Σ p·ŵ, float32 [B, D], where it is asked for; inverse norms are measured
        too."""
        batch, dim = self.unit.shape
        tile = TILES[self.compute_dtype].rows
        block = max(1024, BLOCK_NUMBERS // max(batch, dim) // 1024 * 1024)
        block = min(block, 1 << 14) if self.nearly_radial else block
        partial = self.unit.new_zeros(self.sums_of_each, -(-_padded(len(self.rows)) // tile), batch)
        total = self.unit.new_zeros(batch, dim, dtype=torch.float64 if self.nearly_radial else torch.float32)
        for start in range(0, len(self.rows), block):
            stop = min(start + block, len(self.rows))
            power, rows = self._make(start, stop, partial[:, start // tile :])
            if weighted:
                total += _sum_of_products(power, rows, self.compute_dtype)
        return partial.sum(dim=1, dtype=torch.float64), total

    def weight_unit(self, coefficient: Tensor) -> None:
        self.weighted_unit = (coefficient * self.unit.double()).to(self.dtype)

    def slope(self, start: int, stop: int) -> Tensor:
        """∂loss/∂ŵ of the places [start, stop), float32 [n, D]."""
        assert self.weighted_unit is not None
        power = self._make(start, stop, None)[0] if self.kept is None else self.kept[start:stop]
        return _product(power[: stop - start], self.weighted_unit, self.compute_dtype)

    def block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        with selected(self.unit.device):
            return self.slope(start, stop).mul_(self.rows.inverse[start:stop])

    def _make(self, start: int, stop: int, sums: Tensor | None) -> tuple[Tensor, Tensor]:
        """p [n, B] and ŵ [n, D] of the places [start, stop), with zeros behind up to a whole number of ``_PAD``."""
        padded = _padded(stop - start)
        if self.kept is None:
            power = self.compute_unit.new_empty(padded, len(self.unit))
        else:
            power = self.kept[start : start + padded]
        rows = normalized_rows(self.rows, start, stop, padded, self.compute_dtype)
        index = None if self.rows.index is None else self.rows.index[start:stop]
        powers(
            rows,
            self.compute_unit,
            self.columns,
            index,
            power,
            None if sums is None else sums[0],
            first=start,
            count=stop - start,
            compute_dtype=self.compute_dtype,
            probabilities=None if sums is None or len(sums) == 1 else sums[1],
            **self.arguments,
        )
        return power, rows


def _padded(rows: int) -> int:
    return -(-rows // _PAD) * _PAD


def _sum_of_products(power: Tensor, rows: Tensor, compute_dtype: ComputeDtype) -> Tensor:
    """powerᵀ · rows: [N, B] and [N, D] → [B, D] in float32.

    The sum over N is cut, so that a result of few tiles still keeps every multiprocessor at work.
    """
    (count, batch), dim = power.shape, rows.shape[1]
    tiles = -(-batch // 128) * -(-dim // 256)
    parts = 1
    while parts < 16 and parts * tiles < 128:
        parts *= 2  # at most 16, which divides _PAD
    left = power.view(parts, count // parts, batch).transpose(1, 2)
    return _product(left, rows.view(parts, count // parts, dim), compute_dtype).sum(dim=0)


def _product(left: Tensor, right: Tensor, compute_dtype: ComputeDtype) -> Tensor:
    """left · right in float32, of matrices or of as many of them on both sides."""
    if left.dtype == torch.float32 or not multiplies_to_float32(left.device):
        with products_in(compute_dtype, left.device):
            return left.float() @ right.float()
    return (torch.mm if left.ndim == 2 else torch.bmm)(left, right, out_dtype=torch.float32)
