"""p = exp(scale·z) of a block of rows against the batch: a matrix product whose tiles are exponentiated and summed
before they are written, so that a cosine or a logit never reaches memory."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Triton's language is not the Python that a type checker knows.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...device import interprets
from ..products import ComputeDtype

_LOG2E = 1.4426950408889634


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
    ceiling: float | None,
) -> None:
    """Fills ``power`` [N, B] with exp(scale·rows·unitᵀ), with 0 for own classes, cosines above the ceiling and padding.

    Args:
        rows: normalised rows [N, D]; unit: normalised embeddings [B, D]; both float32 or bfloat16.
        columns: each sample's own class, int64 [B], counted as the places of the whole step are.
        index: −1 where a row is none, int64 [count]; None where all are.
        sums: Σ over each tile's rows before rounding, float32 [⌈N/tile⌉, B]; None where they are not needed.
        first: the place of the first row among all; count: rows that are no padding.
        compute_dtype: of the product: that of the operands, or "tf32".
    """
    tiles = TILES[compute_dtype]
    grid = (triton.cdiv(len(rows), tiles.rows) * triton.cdiv(len(unit), tiles.batch),)
    powers_kernel[grid](
        rows, unit, columns, columns if index is None else index, power, power if sums is None else sums,
        count, len(rows), len(unit), rows.shape[1], first, scale * _LOG2E, 0.0 if ceiling is None else ceiling,
        HAS_INDEX=index is not None, HAS_CEILING=ceiling is not None, HAS_SUMS=sums is not None,
        EVEN=rows.shape[1] % tiles.dim == 0, WIDEN=interprets(rows.device),
        PRECISION="tf32" if compute_dtype == "tf32" else "ieee",
        ROWS=tiles.rows, BATCH=tiles.batch, DIM=tiles.dim,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "first"], do_not_specialize_on_alignment=["index"])
def powers_kernel(
    rows, unit, columns, index, power, sums, count, padded, batch, dim, first, scale, ceiling,
    HAS_INDEX: tl.constexpr, HAS_CEILING: tl.constexpr, HAS_SUMS: tl.constexpr, EVEN: tl.constexpr,
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
    exponent = cosine * scale + tl.where(exists, 0.0, float("-inf"))[:, None]
    if HAS_CEILING:
        exponent = tl.where(cosine > ceiling, float("-inf"), exponent)
    own = tl.load(columns + sample, mask=sample < batch, other=-1) - first
    exponent = tl.where(row[:, None] == own[None, :], float("-inf"), exponent)
    result = tl.exp2(exponent)
    target = power + row[:, None].to(tl.int64) * batch + sample[None, :]
    tl.store(target, result.to(power.dtype.element_ty), mask=(row < padded)[:, None] & (sample < batch)[None, :])
    if HAS_SUMS:
        tl.store(sums + tile.to(tl.int64) * batch + sample, tl.sum(result, axis=0), mask=sample < batch)
