"""In what numbers matrix products are made.

bfloat16 products of a GPU multiply bfloat16 operands and add in float32. On a CPU torch rounds the result of such a
product to bfloat16 as well, up to 0.25 of a logit at scale 64; so there the operands stay float32, and oneDNN is told
that it may multiply them in bfloat16: it adds, and answers, in float32. A CPU without bfloat16 units ignores the
permission and multiplies in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def operand_dtype(compute_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the operands are brought to before a product in ``compute_dtype``."""
    return torch.float32 if device.type == "cpu" and compute_dtype == torch.bfloat16 else compute_dtype


@contextmanager
def products_in(compute_dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Inside, products of operands of ``operand_dtype`` are made in ``compute_dtype``."""
    if device.type != "cpu" or compute_dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
