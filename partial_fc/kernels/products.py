"""The precision of the matrix products: dtypes of their operands, and torch's settings.

bfloat16 products of a GPU multiply bfloat16 operands and add in float32. On a CPU torch rounds the result of such a
product to bfloat16 as well, up to 0.25 of a logit at scale 64; so there the operands stay float32, and oneDNN is
allowed to multiply them in bfloat16: it accumulates in float32, and returns it. Not every processor with bfloat16 units
makes use of that (AMD's Zen 4 does not), so whether it does is measured.

"tf32" products are a GPU's: its tensor cores take float32 operands and read 10 bits of each mantissa. A CPU computes
them in float32. Products in float32 are float32 on both, whatever torch's settings are for other code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..device import multiplies_to_float32

ComputeDtype = torch.dtype | Literal["tf32"]


def stored_dtype(compute_dtype: ComputeDtype) -> torch.dtype:
    """What operands of a GPU's products, and their results where they stay in memory, are stored in."""
    return torch.float32 if compute_dtype == "tf32" else compute_dtype


def operand_dtype(compute_dtype: ComputeDtype, device: torch.device) -> torch.dtype:
    """What the operands are brought to before a product in ``compute_dtype``."""
    if compute_dtype == torch.bfloat16 and not multiplies_to_float32(device):
        return torch.float32
    return stored_dtype(compute_dtype)


def as_operand(values: Tensor, compute_dtype: ComputeDtype) -> Tensor:
    """Float32 values as an operand of a GPU's products, rounded to nearest."""
    return rounded_to_tf32(values) if compute_dtype == "tf32" else values.to(compute_dtype)


def rounded_to_tf32(values: Tensor) -> Tensor:
    """Float32 values [...] of 10 bits of mantissa: Triton's product of others would cut theirs off, not round them."""
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@cache
def rounds_to_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 round their operands on this device, by making one."""
    dtype = operand_dtype(torch.bfloat16, device)
    left = torch.full((256, 512), 1 + 2**-9, device=device).to(dtype)  # in bfloat16: 1
    right = torch.ones(512, 128, device=device, dtype=dtype)
    with _set(torch.backends.mkldnn.matmul, "bf16"):  # pyright: ignore[reportAttributeAccessIssue]
        return bool(((left @ right).float() != 512 * (1 + 2**-9)).all())


@contextmanager
def products_in(compute_dtype: ComputeDtype, device: torch.device) -> Iterator[None]:
    """Inside, products of operands of ``operand_dtype`` are computed in ``compute_dtype``; where ``rounds_to_bfloat16``
    says no, in float32."""
    if multiplies_to_float32(device):
        settings, precision = torch.backends.cuda.matmul, "tf32" if compute_dtype == "tf32" else "ieee"
    else:
        rounds = compute_dtype == torch.bfloat16 and rounds_to_bfloat16(device)
        settings, precision = torch.backends.mkldnn.matmul, "bf16" if rounds else "ieee"  # pyright: ignore[reportAttributeAccessIssue]
    with _set(settings, precision):
        yield


@contextmanager
def _set(settings: Any, precision: str) -> Iterator[None]:
    """Of torch's settings for float32 operands, which are one for the whole process; restored as they were."""
    before = settings.fp32_precision
    if before == precision or (before, precision) == ("none", "ieee"):  # unset is "ieee"
        yield
        return
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def summed_at_once(dim: int) -> int:
    """How many classes a float32 sum of P2SGrad's runs over before it goes into a float64 one.

    Σ_k z_k ŵ_k is nearly all radial, along x̂: K/D of it, where what normalising leaves is about √(K/D). So roundings
    count √(K/D) times, and a product that adds K classes one after the other, as some processors' do, makes of each
    another √K. In parts of at most 32·D classes neither grows.
    """
    return min(max(32 * dim, 256), 4096)
