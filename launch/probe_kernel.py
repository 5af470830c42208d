"""The Triton kernel that ``pfc doctor`` tries: Triton reads a kernel's source from a file."""

import triton
import triton.language as tl


@triton.jit
def add(x, y, out, SIZE: tl.constexpr):
    """out = x + y, for pointers to SIZE float32 each."""
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at) + tl.load(y + at))
