"""Stochastic rounding to bfloat16: small steps add up on average, though each is below the precision of its sum.

Up with the probability of what is cut off, by a hash of the step, the row's class and the place in the row: so the same
on any number of ranks, and in ``native.c``, which says the same in C.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..permutation import hash64, mix


@dataclass(frozen=True)
class Rounding:
    """How the rows of one step are rounded.

    Attributes:
        key: of the step, 32 bits.
        first: the shard's first class.
        ids: of each of the step's rows the place in the shard, int64 [K]; None where these are 0, 1, 2, …
    """

    key: int
    first: int
    ids: Tensor | None

    @classmethod
    def of(cls, seed: int, step: int, first: int, ids: Tensor | None) -> "Rounding":
        return cls(hash64(hash64(seed, 3), step) & 0xFFFFFFFF, first, ids)

    def rounded(self, values: Tensor, start: int, part: int) -> Tensor:
        """Float32 rows [n, D] of the places from ``start`` on, in bfloat16.

        Args:
            values: finite.
            start: place of the first among the step's rows.
            part: which of the matrices they belong to, 0 for the centers.
        """
        count, dim = values.shape
        places = torch.arange(start, start + count, device=values.device)
        classes = self.first + (places if self.ids is None else self.ids[start : start + count])
        keys = mix(classes + self.key) + (part << 16)
        half = (dim + 1) // 2
        random = mix(keys[:, None] + torch.arange(half, device=values.device))
        random = torch.cat([random & 0xFFFF, random >> 16], dim=1)[:, :dim]
        bits = values.contiguous().view(torch.int32) + random.to(torch.int32)
        return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)
