"""Rows of the stored matrix, normalised for the products: gathered, measured, scaled and rounded in one pass."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Triton's language is not the Python that a type checker knows.

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..products import ComputeDtype, stored_dtype
from ..rows import SampledRows


def normalized_rows(rows: SampledRows, start: int, stop: int, padded: int, compute_dtype: ComputeDtype) -> Tensor:
    """The places [start, stop) scaled to length 1, as operands [padded, D]; their inverse norms are known thereafter.

    Zeros stand where the index is −1, and behind the last place.
    """
    dim = rows.weight.shape[1]
    unit = torch.empty(padded, dim, dtype=stored_dtype(compute_dtype), device=rows.weight.device)
    source = rows.weight[start:stop] if rows.index is None else rows.weight
    index = rows.inverse if rows.index is None else rows.index[start:stop]  # not read where all rows are used
    tile, width, warps = row_tile(dim)
    normalize_kernel[(triton.cdiv(padded, tile),)](
        source, index, rows.inverse[start:stop], unit, stop - start, padded, dim,
        HAS_INDEX=rows.index is not None, TF32=compute_dtype == "tf32", TILE=tile, WIDTH=width, num_warps=warps,
    )  # fmt: skip
    return unit


def row_tile(dim: int) -> tuple[int, int, int]:
    """Rows a program takes at once, their width as a power of two, and its warps: 16 or 32 numbers a thread."""
    width = triton.next_power_of_2(dim)
    return max(1, 2048 // width), width, 4 if width <= 2048 else 8


@triton.jit
def row_places(index, place, inside, HAS_INDEX: tl.constexpr):
    """Where in the stored matrix the rows of these places stand, int64, and which of them exist."""
    row = tl.load(index + place, mask=inside, other=-1) if HAS_INDEX else tl.where(inside, place.to(tl.int64), -1)
    return row, row >= 0


# A block of the sum of several passes may begin anywhere in the index: one compiled kernel for all places.
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["index", "inverse"])
def normalize_kernel(
    weight, index, inverse, unit, count, padded, dim,
    HAS_INDEX: tl.constexpr, TF32: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, WIDTH)
    row, exists = row_places(index, place, place < count, HAS_INDEX)
    inside = column[None, :] < dim
    values = tl.load(weight + row[:, None] * dim + column[None, :], mask=exists[:, None] & inside, other=0.0)
    norm = tl.sqrt(tl.sum(values * values, axis=1))
    scale = tl.where(norm > 1e-10, 1.0 / norm, 0.0)  # as rows.inverse_norms
    tl.store(inverse + place, scale, mask=place < count)
    target = unit + place[:, None].to(tl.int64) * dim + column[None, :]
    values *= scale[:, None]
    if TF32:  # as products.rounded_to_tf32
        values = ((values.to(tl.int32, bitcast=True) + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
    tl.store(target, values.to(unit.dtype.element_ty), mask=(place < padded)[:, None] & inside)
