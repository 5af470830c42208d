"""The gradient by the centers that a step used, made a block of rows at a time when somebody asks for it."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .kernels import UnitGradient
from .kernels.rows import SampledRows


class RowGradient(Protocol):
    """∂loss/∂rows for some rows of the shard; all others have none.

    Attributes:
        index: places of the rows in the shard, int64 [K], ascending, each once; None for all of them.
    """

    index: Tensor | None

    def __len__(self) -> int:
        """K."""
        ...

    def block(self, start: int, stop: int, rows: Tensor) -> Tensor:
        """∂loss/∂rows for the places [start, stop) of the K, [n, D], given the centers ``rows`` there [n, D]."""
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
        self.rows = rows
        self.negatives = negatives
        self.places, order = places.sort(stable=True)
        self.own = own[order] * rows.inverse[self.places]

    def __len__(self) -> int:
        return len(self.rows)

    def block(self, start: int, stop: int, rows: Tensor) -> Tensor:
        gradient = self.negatives.block(start, stop, rows)
        first, last = torch.searchsorted(self.places, torch.tensor([start, stop], device=rows.device)).tolist()
        gradient.index_add_(0, self.places[first:last] - start, self.own[first:last])
        # Through w ↦ ŵ: g' − (g'·ŵ) ŵ with g' = (∂loss/∂ŵ)/‖w‖, without a normalised copy.
        along = (gradient * rows).sum(dim=1, keepdim=True)
        return gradient.addcmul_(rows, along * self.rows.inverse[start:stop].square(), value=-1.0)


class RowSum:
    """Gradients that stand in memory: [K, D] of the rows ``index`` [K], or of all rows where that is None."""

    def __init__(self, index: Tensor | None, values: Tensor) -> None:
        self.index = index
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def block(self, start: int, stop: int, rows: Tensor) -> Tensor:
        return self.values[start:stop].clone()


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
    return gradient.block(0, len(gradient), weight if gradient.index is None else weight[gradient.index])
