"""Whether a step's probabilities [B, K] are kept for the row update, or made again from one more matrix product."""

from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..device import default_keep_bytes

__all__ = ["KeepBudget", "default_keep_bytes", "keeps_probabilities", "probability_bytes"]


def probability_bytes(batch: int, rows: int, compute_dtype: torch.dtype) -> int:
    """What the probabilities of ``batch`` samples by ``rows`` classes take in the products' dtype."""
    return batch * rows * compute_dtype.itemsize


def keeps_probabilities(batch: int, rows: int, compute_dtype: torch.dtype, keep_bytes: int) -> bool:
    """Whether they fit into ``keep_bytes``, and are kept."""
    return probability_bytes(batch, rows, compute_dtype) <= keep_bytes


class KeepBudget:
    """The memory for kept probabilities: of all passes together whose gradients wait for the row update.

    What was given out counts for as long as it exists, so nobody has to say when a gradient was used or forgotten.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._given: list[ref[Tensor]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return KeepBudget, (self.limit,)  # a copy of the head has given out nothing

    def keep(self, unit: Tensor, rows: int, dtype: torch.dtype) -> Tensor | None:
        """Memory [rows, B] for the probabilities of ``rows`` classes by the samples ``unit`` [B, D]; None for none."""
        self._given = [one for one in self._given if one() is not None]
        used = sum(tensor.nbytes for one in self._given if (tensor := one()) is not None)
        if not keeps_probabilities(len(unit), rows, dtype, self.limit - used):
            return None
        memory = unit.new_empty(rows, len(unit), dtype=dtype)
        self._given.append(ref(memory))
        return memory
