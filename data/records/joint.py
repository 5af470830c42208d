"""Several data sets as one: a joint label space, and an order that gives each set its share."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import UsageError
from ..order.orders import Integers, Order, Window, counter_hash
from .dataset import RecordDataset
from .index import Shard

_SET_STREAM = 34  # of the hashes; the orders have those below


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
        self._starts = np.cumsum([0] + [len(part) for part in self.sets])

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
    def open(paths: Sequence[str | Path]) -> "JointDataset | RecordDataset":
        """Open the data sets at ``paths``; of one path, the data set itself."""
        sets = [RecordDataset.open(path) for path in paths]
        return sets[0] if len(sets) == 1 else JointDataset(sets)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> tuple[int, np.ndarray]:
        """Joint label and encoded image (uint8 [bytes], read-only); errors as of ``RecordDataset.read``."""
        which, within = self._of(index)
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
        which, within = self._of(index)
        return self.sets[which].locate(within)

    def _of(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return which, index - int(self._starts[which])


def seed_of_set(seed: int, place: int) -> int:
    """The seed of the order of the set in this place: without one of its own, sets of one size would come in one order.

    That of the first set is ``seed``: a set comes in the same order alone.
    """
    return seed if place == 0 else int(counter_hash(seed, _SET_STREAM, place)[0])


class MixedOrder(Order):
    """Several orders as one: each set's own order goes on at its own pace, and the sets take turns evenly.

    In an epoch, set i gives round(weightᵢ · Nᵢ) positions: with weight 1 each of its samples once, with weight 2 twice,
    with 0.5 half of them in one epoch and the others in the next. The turns are spread as evenly as whole numbers allow
    (Bresenham's line), so every stretch of positions has each set's share to within a few samples.

    Args:
        orders: one for each set, in the order of ``JointDataset.sets``.
        weights: how many times an epoch goes through each set.

    Attributes: ``orders``; ``starts``, the first sample of each set, as the joint data set counts them.

    Raises:
        UsageError: an epoch would be too long, some 10⁹ positions.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float]) -> None:
        super().__init__(sum(order.num_samples for order in orders), orders[0].seed)
        self.orders = list(orders)
        self._shares = [
            max(1, round(weight * order.num_samples)) for order, weight in zip(orders, weights, strict=True)
        ]
        self.starts = np.cumsum([0] + [order.num_samples for order in orders])
        self.epoch_size = sum(self._shares)
        if self.epoch_size * max(self._shares) > np.iinfo(np.int64).max:  # a product that ``_turns`` computes
            raise UsageError(
                f"data.train: by its weights an epoch would have {self.epoch_size:,} images: take smaller weights"
            )

    def at(self, positions: Integers) -> Integers:
        positions = np.asarray(positions, dtype=np.int64)
        samples = np.empty_like(positions)
        for which, places, own in self._turns(positions):
            samples[places] = self.orders[which].at(own) + self.starts[which]
        return samples

    def visits(self, positions: Integers) -> Integers:
        positions = np.asarray(positions, dtype=np.int64)
        visits = np.empty_like(positions)
        for which, places, own in self._turns(positions):
            visits[places] = self.orders[which].visits(own)
        return visits

    def upcoming(self, position: int) -> list[Window]:
        epoch, offset = divmod(position, self.epoch_size)
        windows: list[Window] = []
        rest = self.epoch_size
        for order, share, start in zip(self.orders, self._shares, self.starts.tolist(), strict=False):
            before = offset * share // rest  # turns that the set has had in this epoch
            windows += [
                replace(window, first=window.first + start) for window in order.upcoming(epoch * share + before)
            ]
            offset, rest = offset - before, rest - share
        return windows

    def _turns(self, positions: Integers) -> list[tuple[int, Integers, Integers]]:
        """For each set: its number, which of ``positions`` are its turns, and the positions of its own order."""
        epochs, offsets = np.divmod(positions, self.epoch_size)
        left, rest = np.arange(len(positions)), self.epoch_size
        turns = []
        for which, share in enumerate(self._shares):
            # Of the first x positions that the sets before left over, this set has ⌊x · share / rest⌋.
            before = offsets * share // rest
            mine = (offsets + 1) * share // rest > before
            turns.append((which, left[mine], epochs[mine] * share + before[mine]))
            epochs, offsets, left, rest = epochs[~mine], (offsets - before)[~mine], left[~mine], rest - share
        return turns
