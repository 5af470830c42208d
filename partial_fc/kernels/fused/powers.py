"""What a reduction makes of a block of rows and the batch, p = exp(scale·z) or the slope of softplus: a matrix product
whose tiles are worked on and summed before they are written, so that a cosine or a logit never reaches memory."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Triton's language is not the Python that a type checker knows.

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...device import generation, interprets
from ..products import ComputeDtype

LOG2E = 1.4426950408889634  # the exponentials are of base 2


@dataclass(frozen=True)
class Tiles:
    """How the product is cut: tiles of ``rows`` × ``batch``, ``dim`` of the dimension at a time."""

    rows: int
    batch: int
    dim: int
    warps: int
    stages: int


TILES: dict[ComputeDtype, Tiles] = {
    torch.bfloat16: Tiles(128, 128, 64, 8, 3),
    "tf32": Tiles(128, 128, 32, 8, 3),
    torch.float32: Tiles(64, 64, 32, 4, 3),
}


def tiles_of(compute_dtype: ComputeDtype, card: int, *, plain: bool) -> Tiles:
    """Those of a product, none of which needs more registers than there are.

    Args:
        card: its generation; from Blackwell (10) on Triton takes more of them.
        plain: exponentials without hard negatives, which need fewer than those, or than softplus.
    """
    tiles = TILES[compute_dtype]
    return tiles if plain and card < 10 else replace(tiles, batch=64)


def powers(
    rows: Tensor,
    unit: Tensor,
    columns: Tensor,
    index: Tensor | None,
    power: Tensor,
    sums: Tensor | None,
    *,
    first: int,
    count: int,
    compute_dtype: ComputeDtype,
    scale: float,
    threshold: Tensor | None = None,
    numbers: Tensor | None = None,
    probabilities: Tensor | None = None,
    power_of: float = 0.0,
) -> None:
    """Fills ``power`` [N, B] with p of the cosines rows·unitᵀ, with 0 for own classes and padding.

    p is exp(scale·z), of hard negatives exp(scale·g(z) − shift)·g′(z); or the slope of softplus(scale·g(z) + shift).

    Args:
        rows: normalised rows [N, D]; unit: normalised embeddings [B, D]; both float32 or bfloat16.
        columns: each sample's own class, int64 [B], counted as the places of the whole step are.
        index: −1 where a row is none, int64 [count]; None where all are.
        sums: Σ over each tile's rows of the exponentials, or of softplus, float32 [⌈N/tile⌉, B]; None where they are
            not needed.
        first: the place of the first row among all; count: rows that are no padding.
        compute_dtype: of the product: that of the operands, or "tf32".
        threshold: cosines above it are hard, float32 [B]; None for exponentials without any.
        numbers: a, b, c, d and shift·log₂e of hard negatives, float32 [5]; or the shift of softplus, [1].
        probabilities: for softplus Σ of its slope by the shift, as ``sums``.
        power_of: softplus: g(z) = 2·((z + 1)/2)^power_of − 1; 0 for exponentials.
    """
    tiles = tiles_of(compute_dtype, generation(rows.device), plain=threshold is None and not power_of)
    grid = (triton.cdiv(len(rows), tiles.rows) * triton.cdiv(len(unit), tiles.batch),)
    powers_kernel[grid](
        rows, unit, columns, columns if index is None else index, power, power if sums is None else sums,
        power if threshold is None else threshold, power if numbers is None else numbers,
        power if probabilities is None else probabilities,
        count, len(rows), len(unit), rows.shape[1], first, scale if power_of else scale * LOG2E, power_of,
        HAS_INDEX=index is not None, HAS_HARD=threshold is not None, SOFTPLUS=power_of > 0, CURVED=power_of > 1,
        HAS_SUMS=sums is not None,
        EVEN=rows.shape[1] % tiles.dim == 0, WIDEN=interprets(rows.device),
        PRECISION="tf32" if compute_dtype == "tf32" else "ieee",
        ROWS=tiles.rows, BATCH=tiles.batch, DIM=tiles.dim,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "first"], do_not_specialize_on_alignment=["index"])
def powers_kernel(
    rows, unit, columns, index, power, sums, threshold, numbers, probabilities,
    count, padded, batch, dim, first, scale, power_of,
    HAS_INDEX: tl.constexpr, HAS_HARD: tl.constexpr, SOFTPLUS: tl.constexpr, CURVED: tl.constexpr,
    HAS_SUMS: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a tile of rows; the batch stays in the cache anyway.
    tiles = tl.cdiv(batch, BATCH)
    tile = tl.program_id(0) // tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    sample = (tl.program_id(0) % tiles) * BATCH + tl.arange(0, BATCH)
    part = tl.arange(0, DIM)
    # Beyond the last row and sample the first is read again: no mask in the product, and nothing of it is used.
    row_pointer = rows + tl.where(row < padded, row, 0).to(tl.int64)[:, None] * dim + part[None, :]
    unit_pointer = unit + tl.where(sample < batch, sample, 0).to(tl.int64)[None, :] * dim + part[:, None]
    cosine = tl.zeros((ROWS, BATCH), dtype=tl.float32)
    for start in range(0, dim, DIM):
        if EVEN:
            left = tl.load(row_pointer + start)
            right = tl.load(unit_pointer + start)
        else:
            left = tl.load(row_pointer + start, mask=part[None, :] < dim - start, other=0.0)
            right = tl.load(unit_pointer + start, mask=part[:, None] < dim - start, other=0.0)
        if WIDEN:  # Triton's interpreter cannot multiply bfloat16; the products are the same
            left, right = left.to(tl.float32), right.to(tl.float32)
        cosine = tl.dot(left, right, cosine, input_precision=PRECISION)
    exists = row < count
    if HAS_INDEX:
        exists = tl.load(index + row, mask=exists, other=-1) >= 0
    if SOFTPLUS:
        own = tl.load(columns + sample, mask=sample < batch, other=-1) - first
        negative = exists[:, None] & (row[:, None] != own[None, :])
        adjusted, slope = cosine, scale
        if CURVED:
            # log2 of 0 is −∞: the power of it is 0
            logarithm = tl.log2(tl.maximum((cosine + 1.0) * 0.5, 0.0))
            adjusted = 2.0 * tl.exp2(logarithm * power_of) - 1.0
            slope = tl.exp2(logarithm * (power_of - 1.0)) * power_of * scale
        x = adjusted * scale + tl.load(numbers)
        small = tl.exp2(-tl.abs(x) * 1.4426950408889634)
        # log(1 + small) would be 0 where small is: its series
        more = tl.where(small < 1e-3, small * (1.0 - small * (0.5 - small * 0.33333333)), tl.log(1.0 + small))
        summed = tl.where(negative, tl.maximum(x, 0.0) + more, 0.0)
        probability = tl.where(negative, tl.where(x > 0, 1.0, small) / (1.0 + small), 0.0)
        result = probability * slope
    else:
        exponent = cosine * scale
        by_cosine = 1.0
        if HAS_HARD:
            hard = cosine > tl.load(threshold + sample, mask=sample < batch, other=2.0)[None, :]
            square, linear = tl.load(numbers), tl.load(numbers + 1)
            constant, sine_part = tl.load(numbers + 2), tl.load(numbers + 3)
            sine = tl.sqrt(tl.maximum(1.0 - cosine * cosine, 1e-8))
            changed = (square * cosine + linear) * cosine + constant + sine_part * sine
            exponent = tl.where(hard, changed, cosine) * scale - tl.load(numbers + 4)
            by_cosine = tl.where(hard, 2.0 * square * cosine + linear - sine_part * cosine / sine, 1.0)
        exponent += tl.where(exists, 0.0, float("-inf"))[:, None]
        own = tl.load(columns + sample, mask=sample < batch, other=-1) - first
        exponent = tl.where(row[:, None] == own[None, :], float("-inf"), exponent)
        summed = tl.exp2(exponent)
        result = summed * by_cosine if HAS_HARD else summed
    target = power + row[:, None].to(tl.int64) * batch + sample[None, :]
    tl.store(target, result.to(power.dtype.element_ty), mask=(row < padded)[:, None] & (sample < batch)[None, :])
    if HAS_SUMS:
        place = tile.to(tl.int64) * batch + sample
        tl.store(sums + place, tl.sum(summed, axis=0), mask=sample < batch)
        if SOFTPLUS:
            tl.store(probabilities + place, tl.sum(probability, axis=0), mask=sample < batch)
