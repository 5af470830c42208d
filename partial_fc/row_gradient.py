"""The gradient by the centers that a step used, made a block of rows at a time when somebody asks for it."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .kernels import UnitGradient
from .kernels.rows import OwnClasses, SampledRows


class RowGradient(Protocol):
    """∂loss/∂rows for some rows of the shard; all others have none.

    Attributes:
        index: places of the rows in the shard, int64 [K], ascending, each once; None for all of them.
        inverse: inverse norms of the rows, [K, 1], where ``raw_block`` is (∂loss/∂ŵ)/‖w‖ and the way through
            normalising is still to be gone; None where it is ∂loss/∂rows already.
        needs_rows: whether ``raw_block`` wants the centers.
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
    """That of one step: the negatives' part by the kernel, each sample's own class, and the way through normalising.

    Args:
        rows: the centers that the step used.
        negatives: the negatives' part.
        places: the own classes' places among the K, int64 [M], in any order, as often as they occur.
        own: ∂loss/∂ŵ by each of these, [M, D].
    """

    def __init__(self, rows: SampledRows, negatives: UnitGradient, places: Tensor, own: Tensor) -> None:
        self.index = rows.index
        self.inverse = rows.inverse
        self.needs_rows = negatives.needs_rows
        self.negatives = negatives
        self.own_classes = OwnClasses(places)
        self.own = own[self.own_classes.order] * rows.inverse[self.own_classes.places]

    def __len__(self) -> int:
        return len(self.inverse)

    def raw_block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        gradient = self.negatives.block(start, stop, rows)
        inside = self.own_classes.within(start, stop)
        if inside is not None:
            gradient.index_add_(0, self.own_classes.places[inside] - start, self.own[inside])
        return gradient


class RowSum:
    """Gradients that stand in memory: [K, D] of the rows ``index`` [K], or of all rows where that is None."""

    inverse = None
    needs_rows = False

    def __init__(self, index: Tensor | None, values: Tensor) -> None:
        self.index = index
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def raw_block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        return self.values[start:stop].clone()


def project(values: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """From (∂loss/∂ŵ)/‖w‖ [n, D] to ∂loss/∂w, in place, for the rows w [n, D] with their inverse norms [n, 1]."""
    # Through w ↦ ŵ: g' − (g'·ŵ) ŵ with g' = (∂loss/∂ŵ)/‖w‖, without a normalised copy.
    along = (values * rows).sum(dim=1, keepdim=True)
    return values.addcmul_(rows, along * inverse.square(), value=-1.0)


def merged(gradients: Sequence[RowGradient], weight: Tensor) -> RowGradient:
    """The sum of several steps' gradients by the shard's centers ``weight`` [rows, D], each row once."""
    if len(gradients) == 1:
        return gradients[0]
    if any(gradient.index is None for gradient in gradients):
        index, values = None, torch.zeros_like(weight)
    else:
        index = torch.cat([gradient.index for gradient in gradients if gradient.index is not None]).unique()
        values = weight.new_zeros(len(index), weight.shape[1])
    for gradient in gradients:
        part = materialized(gradient, weight)
        if gradient.index is None:
            values += part
        else:
            place = gradient.index if index is None else torch.searchsorted(index, gradient.index)
            values.index_add_(0, place, part)
    return RowSum(index, values)


def materialized(gradient: RowGradient, weight: Tensor) -> Tensor:
    """All of ∂loss/∂rows at once, [K, D], for the shard's centers ``weight`` [rows, D]."""
    rows = weight if gradient.index is None else weight[gradient.index]
    values = gradient.raw_block(0, len(gradient), rows)
    return values if gradient.inverse is None else project(values, rows, gradient.inverse)
