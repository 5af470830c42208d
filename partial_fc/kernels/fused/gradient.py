"""The row gradient of a step on a GPU, whose rows may be padded, and its update without host synchronisation."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ...device import selected
from ...row_gradient import RowGradient
from ...row_update import RowRule
from ...sampling import Draw
from .logsumexp import FusedPowers
from .update import FusedBlock, OwnSlopes, block_rows

# How large a block is in which the sampled rows of several passes are added, as numbers of its slopes: some launches
# more than with one pass, so more rows.
SUM_NUMBERS = 1 << 24


class FusedGradient:
    """That of one step with the fused kernels; as a ``RowGradient``, for inspection, without the padding.

    Args:
        negatives: the negatives' part.
        columns: place of each sample's own class among the step's rows, int64 [B]; −1 where another rank has it.
        own: ∂loss/∂ŵ by these, [B, D].
        draw: how many places each block of classes has, before those of the batch; None where all rows are used.
        padded: whether the step's index has places that are no row, −1, and is in no order.
    """

    needs_rows = False

    def __init__(
        self, negatives: FusedPowers, columns: Tensor, own: Tensor, draw: Draw | None = None, *, padded: bool = True
    ) -> None:
        self.negatives = negatives
        self.rows = negatives.rows
        self.own = OwnSlopes(columns, own)
        self.draw = draw
        self.padded = padded

    def adds(self, others: Sequence[RowGradient]) -> bool:
        """Whether ``apply`` adds these up too."""
        return all(
            isinstance(one, FusedGradient) and (one.rows.index is None) == (self.rows.index is None) for one in others
        )

    def apply(
        self,
        others: "Sequence[FusedGradient]",
        tensors: Sequence[Tensor],
        rule: RowRule,
        factor: Tensor,
        broken: Tensor,
    ) -> None:
        """One step of an optimizer by the sum of this gradient and others of the same centers."""
        weight, *state = tensors
        factor = factor.to(weight.dtype)
        with selected(weight.device):
            for block in self._blocks(others, factor, broken):
                if rule.step_rows is not None:
                    rule.step_rows(block, weight, state)
                    continue
                rows = [block.rows(tensor) for tensor in tensors]
                rule.update(rows[0], block.gradient(weight), rows[1:])
                for tensor, new in zip(tensors, rows, strict=True):
                    block.write(tensor, new)

    def slopes(self, start: int, stop: int) -> Tensor:
        """∂loss/∂ŵ of the places [start, stop), the own classes' part included, [n, D]."""
        slopes = self.negatives.slope(start, stop)
        self.own.add_to(slopes, start)
        return slopes

    def _blocks(self, others: "Sequence[FusedGradient]", factor: Tensor, broken: Tensor) -> Iterator[FusedBlock]:
        index, size = self.rows.index, block_rows(self.rows.weight.shape[1])
        if others and index is not None:
            for union in _unions([self, *others]):
                yield FusedBlock(union.slopes, 0, union.index, union.inverse, factor, broken)
            return
        for start in range(0, len(self.rows), size):
            stop = min(start + size, len(self.rows))
            slopes = self.slopes(start, stop)
            for other in others:  # all rows, in the same places
                slopes += other.slopes(start, stop)
            here = None if index is None else index[start:stop]
            yield FusedBlock(slopes, start, here, self.rows.inverse[start:stop], factor, broken)

    # As a RowGradient, which no step uses: where the rows stand is known to the device alone.

    @cached_property
    def _places(self) -> Tensor | None:
        """The places that are rows, int64 [K], in the order of the rows; None where all are."""
        if self.rows.index is None or not self.padded:
            return None
        ascending, places = self.rows.index.sort()
        return places[ascending >= 0]

    @property
    def index(self) -> Tensor | None:
        return self.rows.index if self.rows.index is None or self._places is None else self.rows.index[self._places]

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
            first, last = int(chosen.min()), int(chosen.max()) + 1
            chosen = chosen - first
        with selected(self.rows.weight.device):
            slopes = self.slopes(first, last)
        return slopes.mul_(self.rows.inverse[first:last])[chosen]


class _Union:
    """Rows of several gradients, each once, and the sums of their slopes; the shapes follow from the places alone.

    Args:
        gradients: of the same centers.
        spans: of each gradient the places [start, stop) that are meant; L in all.

    Attributes:
        rows: int64 [L] ascending, −1 for none, a row that several gradients have as often.
        index: the same, with −1 for all but the first of equal ones.
        inverse: inverse norms [L, 1].
        slopes: [L, D]; where ``index`` is −1, nothing that counts.
    """

    def __init__(self, gradients: Sequence[FusedGradient], spans: Sequence[tuple[int, int]]) -> None:
        parts = [(one, *span) for one, span in zip(gradients, spans, strict=True) if span[0] < span[1]]
        index = torch.cat([one.rows.index[start:stop] for one, start, stop in parts if one.rows.index is not None])
        self.rows, order = index.sort(stable=True)
        first = torch.searchsorted(self.rows, self.rows)
        self.index = torch.where(first == torch.arange(len(order), device=order.device), self.rows, -1)
        self.inverse = torch.cat([one.rows.inverse[start:stop] for one, start, stop in parts])[order]
        places = torch.empty_like(order).scatter_(0, order, first)
        values = gradients[0].own.values
        self.slopes = values.new_zeros(len(order), values.shape[1])
        # One gradient after the other, and each has a row once: the same sum, bit for bit, in every run.
        for (one, start, stop), here in zip(
            parts, places.split([stop - start for _, start, stop in parts]), strict=True
        ):
            self.slopes.index_add_(0, here, one.slopes(start, stop))

    def move_to(self, other: "_Union") -> None:
        """Rows that stand in both are the other's from here on, with their slopes."""
        place = torch.searchsorted(self.rows, other.rows).clamp_max(len(self.rows) - 1)
        both = (self.rows[place] == other.rows)[:, None]
        other.slopes += torch.where(both, self.slopes[place], 0.0)
        place = torch.searchsorted(other.rows, self.rows).clamp_max(len(other.rows) - 1)
        self.index = torch.where(other.rows[place] == self.rows, -1, self.index)


def _unions(gradients: Sequence[FusedGradient]) -> Iterator[_Union]:
    """The rows of sampled gradients, each once, a part of the classes at a time.

    Of each gradient the places of some blocks of classes stand together, and how many they are the host knows. The
    classes that a batch added to them may be anywhere: they come last, with what the other gradients have for them.
    """
    draws = [one.draw for one in gradients]
    totals = [0 if draw is None else draw.total for draw in draws]
    batch = [(total, len(one.rows)) for one, total in zip(gradients, totals, strict=True)]
    if all(start == stop for start, stop in batch):  # a shard without rows
        return
    last = _Union(gradients, batch)
    there = [draw for draw in draws if draw is not None]
    most = sum(draw.most for draw in there)
    first, end = min((draw.first for draw in there), default=0), max((draw.last + 1 for draw in there), default=0)
    size = max(1, SUM_NUMBERS // last.slopes.shape[1] // max(1, most))
    for block in range(first, end, size):
        edges = block, min(block + size, end)
        spans = [(0, 0) if draw is None else (draw.place(edges[0]), draw.place(edges[1])) for draw in draws]
        if any(start < stop for start, stop in spans):
            union = _Union(gradients, spans)
            union.move_to(last)
            yield union
    yield last
