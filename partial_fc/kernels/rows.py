"""The centers that a step uses, read a block at a time where they are stored."""

from bisect import bisect_left

from torch import Tensor

from . import native
from .unit import inverse_norms


class SampledRows:
    """K rows of the shard's matrix.

    Args:
        weight: the shard's centers [rows, D].
        index: places of the K in the shard, int64 [K], ascending, each once; None for all rows.

    Attributes:
        inverse: inverse norms [K, 1], filled by ``measure``; 0 for a row of zeros.
    """

    def __init__(self, weight: Tensor, index: Tensor | None) -> None:
        self.weight = weight
        self.index = index
        self.inverse = weight.new_empty(len(self), 1)

    def __len__(self) -> int:
        return len(self.weight) if self.index is None else len(self.index)

    def block(self, start: int, stop: int) -> Tensor:
        """The stored rows of the places [start, stop), [n, D]: a view where the step uses all rows, else a copy."""
        if self.index is None:
            return self.weight[start:stop]
        return self.weight.index_select(0, self.index[start:stop])

    def measure(self, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """The same, and their inverse norms are known from here on.

        Args:
            buffer: [≥ n, D], where a copy may be put.
        """
        if native.supports(self.weight):  # the rows and their norms in one pass
            copy = None
            if self.index is not None:
                copy = self.weight.new_empty(stop - start, self.weight.shape[1]) if buffer is None else buffer
                copy = copy[: stop - start]
            native.measure_rows(self.weight, self.index, start, stop, copy, self.inverse)
            return self.weight[start:stop] if copy is None else copy
        rows = self.block(start, stop)
        self.inverse[start:stop] = inverse_norms(rows)
        return rows

    def normalized(self, start: int, stop: int) -> Tensor:
        """The same, scaled to length 1."""
        return self.measure(start, stop) * self.inverse[start:stop]

    def at(self, places: Tensor) -> Tensor:
        """The stored rows of any places, [n, D]."""
        return self.weight[places if self.index is None else self.index[places]]


class OwnClasses:
    """The places of the batch's own classes among the K, and which of them stand in a block.

    Args:
        places: int64 [M], in any order; a class may stand there several times.

    Attributes:
        places: the same, ascending.
        order: where each of them stood before, int64 [M].
    """

    def __init__(self, places: Tensor) -> None:
        self.places, self.order = places.sort(stable=True)
        self._listed: list[int] = self.places.tolist()

    def within(self, start: int, stop: int) -> slice | None:
        """Which of the M stand in the block [start, stop); None where none does."""
        first, last = bisect_left(self._listed, start), bisect_left(self._listed, stop)
        return slice(first, last) if last > first else None
