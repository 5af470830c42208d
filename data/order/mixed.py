"""Several orders as one: for joint data sets, and for parts that machines read apart."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import UsageError
from .orders import Integers, Order, Window, counter_hash

_SET_STREAM = 34  # of the hashes; the orders have those below


def seed_of_set(seed: int, place: int) -> int:
    """The seed of the order of the set in this place: without one of its own, sets of one size would come in one order.

    That of the first set is ``seed``: a set comes in the same order alone.
    """
    return seed if place == 0 else int(counter_hash(seed, _SET_STREAM, place)[0])


class PartedOrder(Order):
    """Parts of the samples, each in its own order; every global batch has a stretch of each part, of equal size.

    With as many parts as machines, each machine reads one part alone, in every epoch the same.

    Args:
        orders: one for each part: the first samples, those that follow, …
        batch_size: B, global, a multiple of the number of parts.
    """

    def __init__(self, orders: Sequence[Order], batch_size: int) -> None:
        super().__init__(sum(order.num_samples for order in orders), orders[0].seed)
        self.orders = list(orders)
        self.starts = np.cumsum([0] + [order.num_samples for order in orders])
        self._batch_size, self._stretch = batch_size, batch_size // len(orders)

    def at(self, positions: Integers) -> Integers:
        samples = np.empty_like(np.asarray(positions, dtype=np.int64))
        for which, places, own in self._parts(positions):
            samples[places] = self.orders[which].at(own) + self.starts[which]
        return samples

    def visits(self, positions: Integers) -> Integers:
        visits = np.empty_like(np.asarray(positions, dtype=np.int64))
        for which, places, own in self._parts(positions):
            visits[places] = self.orders[which].visits(own)
        return visits

    def upcoming(self, position: int) -> list[Window]:
        ((which, _, own),) = self._parts(np.array([position]))
        return [
            replace(window, first=window.first + int(self.starts[which]))
            for window in self.orders[which].upcoming(int(own[0]))
        ]

    def _parts(self, positions: Integers) -> list[tuple[int, Integers, Integers]]:
        """For each part of which there is a position: its number, which of ``positions`` are its own, and where those
        are in its own order."""
        batches, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self._batch_size)
        parts, within = np.divmod(offsets, self._stretch)
        return [
            (which, places := np.flatnonzero(parts == which), batches[places] * self._stretch + within[places])
            for which in np.unique(parts).tolist()
        ]


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
