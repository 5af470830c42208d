"""What every loader of training has: batches of its rank, and where in the order of samples the next one begins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import DamagedRecord, UsageError
from ..order.orders import Order

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass
class Batch:
    """One rank's part of a global batch; the tensors belong to whoever receives it.

    Attributes:
        images: float32 [b, 3, H, W], RGB, each value in [-1, 1], on the loader's device.
        labels: int64 [b], on the loader's device.
        samples: int64 [b], which images of the data set they are.
    """

    images: Tensor
    labels: Tensor
    samples: NDArray[np.int64]


class Loader(ABC):
    """Endless iterator over one rank's slices of the global batches.

    With b images a rank and B = b · ranks, a step takes the next B positions of the order and rank r gets the r-th b
    of them. Epochs follow each other without a gap (unless ``drop``), so a batch may hold the end of one and the
    beginning of the next, and every rank takes the same number of steps.

    Args:
        order: of the samples.
        global_batch: B.
        drop: leave out the rest of each epoch that does not fill a global batch.
        position: global samples consumed before this loader starts; 0 for a new run.

    Attributes:
        position: where the next global batch begins.

    Raises:
        UsageError: with ``drop`` an epoch holds less than a global batch.
    """

    def __init__(self, order: Order, *, global_batch: int, drop: bool, position: int) -> None:
        if drop and global_batch > order.epoch_size:
            raise UsageError(
                f"data.remainder: drop leaves nothing of the {order.epoch_size} images of an epoch at a global "
                f"batch of {global_batch}: carry the rest over, or take a smaller batch"
            )
        self._order, self._global_batch, self._drop = order, global_batch, drop
        self.position = self._batch_start(position)

    def __iter__(self) -> Loader:
        return self

    @abstractmethod
    def __next__(self) -> Batch: ...

    @abstractmethod
    def close(self) -> None:
        """Free threads and buffers; batches already handed out stay valid."""

    @property
    def epoch_size(self) -> int:
        """Positions of an epoch."""
        return self._order.epoch_size

    @property
    def epoch(self) -> float:
        """Epochs before ``position``, a fraction."""
        return self.position / self._order.epoch_size

    def batches_until(self, epochs: float) -> int:
        """How many global batches there are from ``position`` to the end of that many epochs of the run."""
        end = round(epochs * self._order.epoch_size)
        return self._order.batches(self.position, end, self._global_batch, drop=self._drop)

    def take_damage(self) -> tuple[int, dict[int, DamagedRecord]]:
        """What this rank met since the last call: how many images were replaced, and which damaged samples it met for
        the first time."""
        return 0, {}

    def _batch_start(self, position: int) -> int:
        """Where the first global batch from ``position`` on begins."""
        return self._order.batch_start(position, self._global_batch, drop=self._drop)
