"""The gradient by the centers that a step used, computed a block of rows at a time on demand."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .kernels import UnitGradient
from .kernels.rows import OwnClasses, SampledRows
from .storage import TakenRows


class RowGradient(Protocol):
    """∂loss/∂rows for some rows of the shard; all others have none.

    Attributes:
        index: places of the rows in the shard, int64 [K], ascending, each once; None for all of them.
        inverse: inverse norms of the rows, [K, 1], where ``raw_block`` is (∂loss/∂ŵ)/‖w‖ and the backward of
            normalising is still to be applied; None where it is ∂loss/∂rows already.
        needs_rows: whether ``raw_block`` needs the centers.
    """

    @property
    def index(self) -> Tensor | None: ...

    @property
    def inverse(self) -> Tensor | None: ...

    @property
    def needs_rows(self) -> bool: ...

    def __len__(self) -> int:
        """K."""
        ...

    def raw_block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        """What ``inverse`` says, for the places [start, stop) of the K: [n, D], to be changed until the next call."""
        ...


class StepGradient:
    """That of one step: the negatives' part by the kernel, and each sample's own class.

    Args:
        rows: the centers that the step used.
        negatives: the negatives' part.
        own: the samples' own classes.
        slopes: ∂loss/∂ŵ of the own classes that are here, [M, D], in the order of ``own.samples``.
    """

    def __init__(self, rows: SampledRows, negatives: UnitGradient, own: OwnClasses, slopes: Tensor) -> None:
        self.rows = rows
        self.inverse = rows.inverse
        self.needs_rows = negatives.needs_rows
        self.negatives = negatives
        self.own = own
        self.slopes = slopes * rows.inverse[own.places]

    @property
    def index(self) -> Tensor | None:
        return self.rows.index

    def __len__(self) -> int:
        return len(self.inverse)

    def raw_block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        gradient = self.negatives.block(start, stop, rows)
        self.own.add(gradient, start, stop, self.slopes)
        return gradient


class StagedGradient:
    """A gradient by a step's copy of its rows (``storage.py``), as one by the rows of the shard.

    Args:
        inner: by the copy; its places are those of ``taken``, in the same order.
        taken: the copy.
        rows: what ``inner`` reads it through.
    """

    def __init__(self, inner: RowGradient, taken: TakenRows, rows: SampledRows) -> None:
        self.inner, self.taken, self.rows = inner, taken, rows
        self.index = taken.places.to(taken.index.device)

    @property
    def inverse(self) -> Tensor | None:
        return self.inner.inverse

    @property
    def needs_rows(self) -> bool:
        return self.inner.needs_rows

    def __len__(self) -> int:
        return len(self.index)

    def raw_block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        return self.inner.raw_block(start, stop, rows)

    def read_from(self, taken: TakenRows) -> None:
        """From here on the rows are read from another copy, which has more of them."""
        slots = taken.slots[torch.searchsorted(taken.places, self.taken.places)]
        self.rows.weight, self.rows.index = taken.parts[0], slots.to(self.rows.device)


def project(values: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """From (∂loss/∂ŵ)/‖w‖ [n, D] to ∂loss/∂w, in place, for the rows w [n, D] with their inverse norms [n, 1]."""
    # Through w ↦ ŵ: g' − (g'·ŵ) ŵ with g' = (∂loss/∂ŵ)/‖w‖, without a normalised copy.
    along = (values * rows).sum(dim=1, keepdim=True)
    return values.addcmul_(rows, along * inverse.square(), value=-1.0)


def finished_block(gradient: RowGradient, start: int, stop: int, rows: Tensor) -> Tensor:
    """∂loss/∂rows for the places [start, stop) of the K, [n, D], given the centers ``rows`` there [n, D]."""
    values = gradient.raw_block(start, stop, rows)
    return values if gradient.inverse is None else project(values, rows, gradient.inverse[start:stop])


class GradientSum:
    """The sum of several passes' gradients, made a block at a time as well: no [K, D] of any of them.

    Args:
        gradients: of the passes.
        size: rows of a block; ``raw_block`` is called for [0, size), [size, 2·size) and so on.
        every: of how many rows it is, where it has all of the shard's, those without a gradient too.
    """

    inverse = None
    needs_rows = True
    index: Tensor | None

    def __init__(self, gradients: Sequence[RowGradient], size: int, every: int | None = None) -> None:
        self.gradients = gradients
        self.size = size
        indices = [gradient.index for gradient in gradients]
        sampled = [index for index in indices if index is not None]
        self.index = torch.cat(sampled).unique() if len(sampled) == len(indices) and every is None else None
        self.length = every or (max(map(len, gradients)) if self.index is None else len(self.index))
        self.places = [  # of each gradient's rows among those of the sum; None where they are the same
            index if self.index is None or index is None else torch.searchsorted(self.index, index) for index in indices
        ]
        self.cuts = self._cuts()

    def __len__(self) -> int:
        return self.length

    def raw_block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        assert rows is not None
        values = torch.zeros_like(rows)
        for gradient, places, cuts in zip(self.gradients, self.places, self.cuts, strict=True):
            if places is None:
                values += finished_block(gradient, start, stop, rows)
                continue
            first, last = cuts[start // self.size : start // self.size + 2]
            if last > first:
                here = places[first:last] - start
                values.index_add_(0, here, finished_block(gradient, first, last, rows[here]))
        return values

    def _cuts(self) -> list[list[int]]:
        """For each gradient how many of its rows stand before each block; on a GPU one synchronisation for all."""
        there = [places for places in self.places if places is not None]
        if not there:
            return [[] for _ in self.places]
        edges = torch.arange(0, self.length + self.size, self.size, device=there[0].device)
        cuts = iter(torch.stack([torch.searchsorted(places, edges) for places in there]).tolist())
        return [[] if places is None else next(cuts) for places in self.places]
