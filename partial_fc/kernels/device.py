"""Which steps the fused kernels of a GPU take."""

import functools
import importlib.util

import torch
from torch import Tensor

from .unshifted import MAX_SCALE

_WIDEST = 8192  # a row of it, its gradient and its momentum still fit the registers of one program


def fits(weight: Tensor, compute_dtype: torch.dtype, scale: float) -> bool:
    """Whether the fused kernels take a step on these centers; where not, torch's own operations do, there too."""
    return (
        runs_on(weight.device)
        and weight.dtype == torch.float32
        and compute_dtype in (torch.float32, torch.bfloat16)
        and weight.shape[1] <= _WIDEST
        and scale <= MAX_SCALE
    )


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether Triton is there, and the device one that multiplies bfloat16."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
