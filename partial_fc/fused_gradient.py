"""The row gradient of a step on a GPU, whose rows may be padded, and its way into the rows without the host."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from .kernels.fused import FusedPowers
from .kernels.fused_update import FusedBlock, OwnSlopes, block_rows
from .row_update import OnePassRule, RowRule


class FusedGradient:
    """That of one step with the fused kernels; as a ``RowGradient``, for those who add several, without the padding.

    Args:
        negatives: the negatives' part.
        columns: place of each sample's own class among the step's rows, int64 [B]; −1 where another rank has it.
        own: ∂loss/∂ŵ by these, [B, D].
    """

    needs_rows = False

    def __init__(self, negatives: FusedPowers, columns: Tensor, own: Tensor) -> None:
        self.negatives = negatives
        self.rows = negatives.rows
        self.own = OwnSlopes(columns, own)

    def apply(self, tensors: Sequence[Tensor], rule: RowRule, factor: Tensor, broken: Tensor) -> None:
        """One step of an optimizer; see ``row_update.apply``."""
        weight, *state = tensors
        factor = factor.to(weight.dtype)
        size = block_rows(weight.shape[1])
        with torch.cuda.device_of(weight):
            for start in range(0, len(self.rows), size):
                block = self._block(start, min(start + size, len(self.rows)), factor, broken)
                if isinstance(rule, OnePassRule):
                    rule.step_rows(block, weight, state)
                    continue
                rows = [block.rows(tensor) for tensor in tensors]
                rule.update(rows[0], block.gradient(weight), rows[1:])
                for tensor, new in zip(tensors, rows, strict=True):
                    block.write(tensor, new)

    def _block(self, start: int, stop: int, factor: Tensor, broken: Tensor) -> FusedBlock:
        index = None if self.rows.index is None else self.rows.index[start:stop]
        slopes = self.negatives.slope(start, stop)
        block = FusedBlock(slopes, start, index, self.rows.inverse[start:stop], factor, broken)
        block.add_own(self.own, start)
        return block

    # As a RowGradient. Where the rows stand is known to the device alone: only who adds up several steps asks.

    @cached_property
    def _places(self) -> Tensor | None:
        """The places that are rows, int64 [K]; None where all are."""
        return None if self.rows.index is None else (self.rows.index >= 0).nonzero()[:, 0]

    @property
    def index(self) -> Tensor | None:
        return None if self.rows.index is None or self._places is None else self.rows.index[self._places]

    @property
    def inverse(self) -> Tensor:
        return self.rows.inverse if self._places is None else self.rows.inverse[self._places]

    def __len__(self) -> int:
        return len(self.rows) if self._places is None else len(self._places)

    def raw_block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        first, last, chosen = start, stop, slice(None)
        if self._places is not None:
            if start == stop:
                return self.own.values[:0]
            chosen = self._places[start:stop]
            first, last = int(chosen[0]), int(chosen[-1]) + 1
            chosen = chosen - first
        weight = self.rows.weight
        with torch.cuda.device_of(weight):
            nothing = torch.zeros((), device=weight.device)
            slopes = self._block(first, last, nothing, nothing > 0).slopes
        return slopes.mul_(self.rows.inverse[first:last])[chosen]
