"""Several data sets as one, in a joint label space."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from ..remote.mirror import RemoteOptions
from .dataset import RecordDataset
from .index import Shard


class JointDataset:
    """Several data sets one after the other; reads as ``RecordDataset`` does.

    Labels are offset set by set: those of the first are 0 … C₁ − 1, those of the second C₁ … C₁ + C₂ − 1. An identity
    that is in two of the sets has two labels.

    Attributes: ``sets``; ``name``, all names joined by ``+``; ``image_size`` (height, width), None where the sets
    differ or one does not say.
    """

    def __init__(self, sets: Sequence[RecordDataset]) -> None:
        self.sets = list(sets)
        self.name = "+".join(part.name for part in self.sets)
        sizes = {part.image_size for part in self.sets}
        self.image_size = sizes.pop() if len(sizes) == 1 else None
        self._starts = [0, *accumulate(map(len, self.sets))]

    @property
    def told_classes(self) -> int | None:
        """How many identities the sets say they have, None where one does not say."""
        told = [part.told_classes for part in self.sets]
        return None if None in told else sum(count for count in told if count is not None)

    @cached_property
    def _first_labels(self) -> list[int]:
        return [0, *accumulate(part.num_classes for part in self.sets)]

    @property
    def num_classes(self) -> int:
        """How many identities there are in all sets together; read from the labels where a set does not say."""
        return self._first_labels[-1]

    @staticmethod
    def open(paths: Sequence[str | Path], *, remote: RemoteOptions | None = None) -> "JointDataset | RecordDataset":
        """Open the data sets at ``paths``, as ``RecordDataset.open`` does; of one path, the data set itself."""
        sets = [RecordDataset.open(path, remote=remote) for path in paths]
        return sets[0] if len(sets) == 1 else JointDataset(sets)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> tuple[int, np.ndarray]:
        """Joint label and encoded image (uint8 [bytes], read-only); errors as of ``RecordDataset.read``."""
        which, within = self.set_of(index)
        label, image = self.sets[which].read(within)
        return label + self._first_labels[which], image

    def label(self, index: int) -> int:
        """The joint label of image ``index``; errors as ``read``."""
        return self.read(index)[0]

    def labels(self, *, damaged: Literal[-1] | None = None) -> np.ndarray:
        """All joint labels, int64 [len]; as of ``RecordDataset.labels``."""
        parts = [part.labels(damaged=damaged).astype(np.int64) for part in self.sets]
        return np.concatenate(
            [np.where(own < 0, own, own + first) for own, first in zip(parts, self._first_labels, strict=False)]
        )

    def locate(self, index: int) -> tuple[Shard, int]:
        """The shard that holds image ``index``, and its record's position there."""
        which, within = self.set_of(index)
        return self.sets[which].locate(within)

    def set_of(self, index: int) -> tuple[int, int]:
        """Which of the sets holds image ``index``, and the image's number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        which = bisect_right(self._starts, index) - 1
        return which, index - self._starts[which]
