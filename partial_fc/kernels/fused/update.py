"""The row update on a GPU: rows and their state are read and written once, and a broken step writes nothing.

The slopes ∂loss/∂ŵ of a block of rows are computed first; while they are in the cache, one pass adds each sample's
gradient of its own class, applies the backward of normalising, and the optimizer's rule. Whether the step is broken,
and what the gradient is multiplied with, are numbers on the device.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Triton's language is not the Python that a type checker knows.

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..row_step import RowStep
from .rows import row_places, row_tile

# How large a block is, as numbers of its slopes: 131,072 rows of 512, 256 MiB. Few launches: they cost the host time.
BLOCK_NUMBERS = 1 << 26


def block_rows(dim: int) -> int:
    """How many rows the update takes at a time."""
    return max(1024, BLOCK_NUMBERS // dim)


@dataclass(frozen=True)
class FusedBlock(RowStep):
    """A block of n of a step's rows.

    Attributes:
        slopes: ∂loss/∂ŵ of all samples, float32 [n, D].
        start: the first row, where ``index`` is None.
        index: where the rows stand in the shard, int64 [n], −1 for none; None for those from ``start`` on.
        inverse: inverse norms [n, 1].
        factor: multiplies the gradient, float32 [].
        broken: bool []; where it is true, nothing is written.
    """

    slopes: Tensor
    start: int
    index: Tensor | None
    inverse: Tensor
    factor: Tensor
    broken: Tensor

    def gradient(self, weight: Tensor) -> Tensor:
        """factor·∂loss/∂w [n, D], in the place of the slopes, for the shard's centers [N, D]."""
        self._launch(project_kernel, self.slopes, self._part(weight), *self._common())
        return self.slopes

    def _run(self, rule: str, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> None:
        constants = {}
        if rule == "sgd":
            weight, velocity = tensors
            *numbers, nesterov = numbers
            constants = {"HAS_MOMENTUM": velocity is not None, "NESTEROV": bool(nesterov)}
            tensors = [weight, weight if velocity is None else velocity]  # not read where there is none
        elif rule == "adamw":
            lr, *betas, eps, decay = numbers
            rests = [1.0 - beta for beta in betas]  # here, as float32 would leave few digits
            logs = [math.log2(beta) if beta else -math.inf for beta in betas]
            numbers = [lr, betas[1], *rests, *logs, eps, decay]
        parts = [self._part(one) for one in tensors if one is not None]
        self._launch(_RULES[rule], self.slopes, *parts, *self._common(), *numbers, **constants)

    def rows(self, matrix: Tensor) -> Tensor:
        """A copy of the rows [n, ...] of a matrix [N, ...]; any row where there is none."""
        if self.index is None:
            return self._part(matrix).clone()
        return matrix.index_select(0, self.index.clamp_min(0))

    def write(self, matrix: Tensor, rows: Tensor) -> None:
        """Puts rows [n, ...] where they belong in the matrix [N, ...]."""
        _, index, *_, broken = self._common()
        self._launch(write_kernel, rows.contiguous(), self._part(matrix), index, broken)

    def _part(self, matrix: Tensor) -> Tensor:
        """From the launch's first row on; so without an index no offset goes beyond a block."""
        return matrix if self.index is not None else matrix[self.start : self.start + len(self.slopes)]

    def _common(self) -> list[Tensor]:
        index = self.inverse if self.index is None else self.index  # not read where there is none
        return [self.inverse, index, self.factor, self.broken.view(torch.uint8)]

    def _launch(self, kernel: Any, values: Tensor, *arguments: Any, **constants: bool) -> None:
        count, dim = len(values), values[0].numel()
        tile, width, warps = row_tile(dim)
        constants["HAS_INDEX"] = self.index is not None
        kernel[(triton.cdiv(count, tile),)](
            values, *arguments, count, dim, **constants, TILE=tile, WIDTH=width, num_warps=warps
        )


class OwnSlopes:
    """∂loss/∂ŵ of each sample's own class.

    Args:
        columns: place of that class among the step's, int64 [B]; −1 where it is another rank's.
        values: the slopes, float32 [B, D].
    """

    def __init__(self, columns: Tensor, values: Tensor) -> None:
        self.places, order = columns.sort(stable=True)
        self.values = values.index_select(0, order)
        self.begin = torch.searchsorted(self.places, self.places)  # of the run of equal places
        self.end = torch.searchsorted(self.places, self.places, right=True)

    def add_to(self, slopes: Tensor, first: int) -> None:
        """Adds to slopes [n, D], those of the step's places from ``first`` on, what each sample's own class gets."""
        count, dim = slopes.shape
        own_kernel[(len(self.places),)](
            slopes, self.places, self.begin, self.end, self.values, first, count, dim,
            WIDTH=triton.next_power_of_2(dim),
        )  # fmt: skip


@triton.jit(do_not_specialize=["start", "count"])
def own_kernel(slopes, places, begin, end, own, start, count, dim, WIDTH: tl.constexpr):
    sample = tl.program_id(0)
    place = tl.load(places + sample) - start
    column = tl.arange(0, WIDTH)
    inside = column < dim
    # The first of a run adds them all, always in the same order.
    if (place >= 0) & (place < count) & (tl.load(begin + sample) == sample):
        total = tl.zeros((WIDTH,), dtype=tl.float32)
        source = own + sample.to(tl.int64) * dim + column
        for _ in range(sample, tl.load(end + sample).to(tl.int32)):
            total += tl.load(source, mask=inside, other=0.0)
            source += dim
        target = slopes + place * dim + column
        tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def read_rows(
    slopes, weight, inverse, index, factor, count, dim,
    HAS_INDEX: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of factor·∂loss/∂w = factor·(g − (g·ŵ) ŵ)/‖w‖ with g = ∂loss/∂ŵ, of the rows, and where they stand."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, WIDTH)
    row, exists = row_places(index, place, place < count, HAS_INDEX)
    inside = exists[:, None] & (column[None, :] < dim)
    slope = tl.load(slopes + place[:, None].to(tl.int64) * dim + column[None, :], mask=inside, other=0.0)
    offset = row[:, None] * dim + column[None, :]
    values = tl.load(weight + offset, mask=inside, other=0.0)
    scale = tl.load(inverse + place, mask=exists, other=0.0)[:, None]
    unit = values * scale
    along = tl.sum(slope * unit, axis=1)[:, None]
    return (slope - along * unit) * scale * tl.load(factor), values, offset, inside, row, exists


@triton.jit(do_not_specialize=["count"])
def project_kernel(
    slopes, weight, inverse, index, factor, broken, count, dim,
    HAS_INDEX: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    gradient, _, _, _, _, _ = read_rows(slopes, weight, inverse, index, factor, count, dim, HAS_INDEX, TILE, WIDTH)
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, WIDTH)
    inside = (place < count)[:, None] & (column[None, :] < dim)
    tl.store(slopes + place[:, None].to(tl.int64) * dim + column[None, :], gradient, mask=inside)


@triton.jit(do_not_specialize=["count"])
def sgd_kernel(
    slopes, weight, velocity, inverse, index, factor, broken, lr, momentum, decay, count, dim,
    HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    HAS_INDEX: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    if tl.load(broken) == 0:
        gradient, values, offset, inside, _, _ = read_rows(
            slopes, weight, inverse, index, factor, count, dim, HAS_INDEX, TILE, WIDTH
        )
        gradient += decay * values
        if HAS_MOMENTUM:
            speed = momentum * tl.load(velocity + offset, mask=inside, other=0.0) + gradient
            tl.store(velocity + offset, speed, mask=inside)
            if NESTEROV:
                gradient += momentum * speed
            else:
                gradient = speed
        tl.store(weight + offset, values - lr * gradient, mask=inside)


@triton.jit(do_not_specialize=["count"])
def adamw_kernel(
    slopes, weight, first, second, steps, inverse, index, factor, broken,
    lr, beta2, rest1, rest2, log1, log2, eps, decay, count, dim,
    HAS_INDEX: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    if tl.load(broken) == 0:
        gradient, values, offset, inside, row, exists = read_rows(
            slopes, weight, inverse, index, factor, count, dim, HAS_INDEX, TILE, WIDTH
        )
        step = tl.load(steps + row, mask=exists, other=0.0) + 1.0
        tl.debug_barrier()  # every warp has read its rows' steps, each for itself, before one of them writes
        tl.store(steps + row, step, mask=exists)
        mean = tl.load(first + offset, mask=inside, other=0.0)
        mean += rest1 * (gradient - mean)
        tl.store(first + offset, mean, mask=inside)
        square = beta2 * tl.load(second + offset, mask=inside, other=0.0) + rest2 * gradient * gradient
        tl.store(second + offset, square, mask=inside)
        # 1 − βᵗ in float64: of a β near 1 float32 would leave few digits.
        size = (lr / (1.0 - tl.exp2(step.to(tl.float64) * log1))).to(tl.float32)[:, None]
        root = tl.sqrt(1.0 - tl.exp2(step.to(tl.float64) * log2)).to(tl.float32)[:, None]
        values = values * (1.0 - lr * decay) - size * mean / (tl.sqrt(square) / root + eps)
        tl.store(weight + offset, values, mask=inside)


@triton.jit(do_not_specialize=["count"])
def adagrad_kernel(
    slopes, weight, total, inverse, index, factor, broken, lr, eps, decay, count, dim,
    HAS_INDEX: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    if tl.load(broken) == 0:
        gradient, values, offset, inside, row, exists = read_rows(
            slopes, weight, inverse, index, factor, count, dim, HAS_INDEX, TILE, WIDTH
        )
        gradient += decay * values
        sum = tl.load(total + row, mask=exists, other=0.0) + tl.sum(gradient * gradient, axis=1) / dim
        tl.debug_barrier()  # as in adamw_kernel
        tl.store(total + row, sum, mask=exists)
        tl.store(weight + offset, values - lr * gradient / (tl.sqrt(sum)[:, None] + eps), mask=inside)


@triton.jit(do_not_specialize=["count"])
def write_kernel(
    values, target, index, broken, count, dim, HAS_INDEX: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    if tl.load(broken) == 0:
        place = tl.program_id(0) * TILE + tl.arange(0, TILE)
        column = tl.arange(0, WIDTH)
        row, exists = row_places(index, place, place < count, HAS_INDEX)
        inside = exists[:, None] & (column[None, :] < dim)
        new = tl.load(values + place[:, None].to(tl.int64) * dim + column[None, :], mask=inside, other=0.0)
        tl.store(target + row[:, None] * dim + column[None, :], new, mask=inside)


_RULES = {"sgd": sgd_kernel, "adamw": adamw_kernel, "adagrad": adagrad_kernel}
