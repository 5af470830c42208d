"""The order in which training sees the samples: computed, never stored.

Every order is a function of (seed, position). Position counts samples of all ranks together from the beginning of the
run, so one integer says where a run is, every world size sees the same order, and any position can be asked for
directly.

Orders are made of keyed permutations (``permuted``). A Feistel network over the smallest power of two that holds N is
a bijection whatever its round function; values that land outside [0, N) are sent through it again until they fall
inside (cycle-walking), which leaves a bijection on [0, N). That takes O(1) memory.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF
_BLOCK_STREAM, _SHORT_STREAM, _WINDOW_STREAM = 16, 17, 18  # of the hashes; the augmentations have those below


def counter_hash(seed: int, *counters: Integers | int) -> Words:
    """64 well-mixed bits for every (seed, counters) tuple, the same on every machine and in any batch.

    Args:
        seed: key of the whole stream; any Python integer, taken modulo 2⁶⁴.
        counters: integer arrays (or integers) that broadcast together, e.g. epoch and sample.

    Returns:
        uint64 array of the broadcast shape (at least one-dimensional).
    """
    state = _mix(np.asarray([seed & _WORD], dtype=np.uint64))
    for counter in counters:
        word = np.atleast_1d(np.asarray(counter, dtype=np.int64)).astype(np.uint64)
        state = _mix(state + word * np.uint64(_GOLDEN) + np.uint64(_GOLDEN))
    return state


def permuted(values: Integers, sizes: Integers | int, keys: Words) -> Integers:
    """Where a keyed permutation of [0, size) sends each value.

    Args:
        values: int64 [n], each in [0, size).
        sizes: int64 [n] or one number for all, each at least 1.
        keys: uint64 [n] or [1]; another key, another permutation.

    Returns:
        int64 [n], each in [0, size).
    """
    sizes = np.broadcast_to(np.asarray(sizes, dtype=np.int64), values.shape)
    keys = np.broadcast_to(keys, values.shape)
    bits = np.maximum(np.frexp((sizes - 1).astype(np.float64))[1], 1).astype(np.uint64)  # of size − 1, below 2⁵³
    low_bits = (bits + np.uint64(1)) >> np.uint64(1)
    out = _feistel(values.astype(np.uint64), bits, low_bits, keys)
    limits = sizes.astype(np.uint64)
    outside = np.flatnonzero(out >= limits)
    while outside.size:
        out[outside] = _feistel(out[outside], bits[outside], low_bits[outside], keys[outside])
        outside = outside[out[outside] >= limits[outside]]
    return out.astype(np.int64)


def _feistel(values: Words, bits: Words, low_bits: Words, keys: Words) -> Words:
    """One pass through the network: a bijection of [0, 2^bits), keyed per element."""
    one = np.uint64(1)
    low_mask, high_mask = (one << low_bits) - one, (one << (bits - low_bits)) - one
    high, low = values >> low_bits, values & low_mask
    for round_index in range(0, _ROUNDS, 2):
        # The halves may differ by a bit, so they are not swapped: each round changes the other one.
        high = high ^ (_mix(keys + low + np.uint64(_round_constant(round_index))) & high_mask)
        low = low ^ (_mix(keys + high + np.uint64(_round_constant(round_index + 1))) & low_mask)
    return (high << low_bits) | low


def _mix(values: Words) -> Words:
    """The finaliser of splitmix64: a bijection of 64-bit words; every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_constant(round_index: int) -> int:
    return ((round_index + 1) * _GOLDEN) & _WORD


class Order(ABC):
    """What every order has.

    Args:
        num_samples: N ≥ 1, samples of the data set.
        seed: another seed, another order.

    Attributes:
        epoch_size: positions of an epoch; N unless the order says otherwise.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        self.epoch_size = num_samples

    @abstractmethod
    def at(self, positions: Integers) -> Integers:
        """The samples at the given global positions.

        Args:
            positions: int64 [n], each ≥ 0; they may lie in different epochs.

        Returns:
            int64 [n], each in [0, N).
        """

    def epoch(self, positions: Integers) -> Integers:
        """The epoch that each position belongs to: int64, the shape of ``positions``."""
        return np.asarray(positions, dtype=np.int64) // self.epoch_size

    def visits(self, positions: Integers) -> Integers:
        """A number for each position that no other position of the same sample has: with the sample, it names the
        picture, so augmentations are drawn from the two. int64, the shape of ``positions``."""
        return self.epoch(positions)

    def batch_start(self, position: int, batch_size: int, *, drop: bool) -> int:
        """Where the first global batch from ``position`` on begins.

        drop: leave out the rest of an epoch that does not fill a batch; without, batches go on into the next epoch.
        """
        if drop and position % self.epoch_size + batch_size > self.epoch_size:
            return (position // self.epoch_size + 1) * self.epoch_size
        return position

    def batches(self, position: int, end: int, batch_size: int, *, drop: bool) -> int:
        """How many global batches begin from ``position`` on and before ``end``."""
        if not drop:
            return max(0, -(-(end - position) // batch_size))
        count, size = 0, self.epoch_size
        if position % size:  # the rest of this epoch
            stop = min(end, (position // size + 1) * size)
            count = min((stop - position + batch_size - 1) // batch_size, (size - position % size) // batch_size)
            position = (position // size + 1) * size
        if position >= end:
            return max(0, count)
        epochs, rest = divmod(end - position, size)
        return count + epochs * (size // batch_size) + min(-(-rest // batch_size), size // batch_size)

    def upcoming(self, position: int) -> list["Window"]:
        """The windows that are read at ``position`` and next, if samples come in blocks; otherwise no windows."""
        return []

    def substitute(self, position: int, attempt: int) -> int:
        """Which position's sample to take instead, where that of ``position`` is damaged and those of all earlier
        attempts (from 1 on) are too: the following ones of the same epoch, in a circle."""
        epoch, offset = divmod(position, self.epoch_size)
        return epoch * self.epoch_size + (offset + attempt) % self.epoch_size


class SampleOrder(Order):
    """The global order: a permutation of [0, N) for every epoch, one after the other, without end.

    Position p belongs to epoch p // N; over the N positions of an epoch every sample comes exactly once.
    """

    def at(self, positions: Integers) -> Integers:
        positions = np.asarray(positions, dtype=np.int64)
        keys = counter_hash(self.seed, self.epoch(positions))
        return permuted(positions % self.num_samples, self.num_samples, keys)


class BlockOrder(Order):
    """The order for slow disks: blocks of neighbouring samples in random order, shuffled within a bounded window.

    An epoch goes through all blocks in a random order; ``window`` samples of that row at a time are then shuffled among
    themselves. So every sample comes exactly once in an epoch, and while ``window`` positions go by, only the blocks of
    one window are read, each of them once and whole.

    Args:
        num_samples, seed: as for every order.
        block_size: neighbouring samples that are read together; the last block of the data set may hold fewer.
        window: samples that are shuffled among themselves; the last window of an epoch may hold fewer.
    """

    def __init__(self, num_samples: int, seed: int, *, block_size: int, window: int) -> None:
        super().__init__(num_samples, seed)
        self.block_size = block_size
        self.window = window

    def at(self, positions: Integers) -> Integers:
        positions = np.asarray(positions, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.num_samples)
        windows, places = np.divmod(offsets, self.window)
        starts = windows * self.window
        sizes = np.minimum(self.window, self.num_samples - starts)
        keys = counter_hash(self.seed, _WINDOW_STREAM, epochs, windows)
        return self._row(epochs, starts + permuted(places, sizes, keys))

    def upcoming(self, position: int) -> list["Window"]:
        here = Window(self, self._window_start(position))
        return [here, Window(self, self._window_start(here.start + self.window))]

    def _window_start(self, position: int) -> int:
        """The position where the window of ``position`` begins."""
        return position - position % self.num_samples % self.window

    def runs(self, position: int) -> list[tuple[int, int]]:
        """As ``Window.runs``, of the window that ``position`` lies in."""
        epoch, offset = divmod(position, self.num_samples)
        start = offset // self.window * self.window
        places = np.arange(start, min(start + self.window, self.num_samples), dtype=np.int64)
        samples = self._row(np.full_like(places, epoch), places)
        cuts = np.flatnonzero(np.diff(samples) != 1) + 1
        return [(int(run[0]), int(run[-1]) + 1) for run in np.split(samples, cuts)]

    def _row(self, epochs: Integers, places: Integers) -> Integers:
        """The samples at the given places of an epoch's row of blocks, before the shuffle within windows."""
        full, rest = divmod(self.num_samples, self.block_size)
        # The short block stands at a random place among the full ones.
        short_starts = (counter_hash(self.seed, _SHORT_STREAM, epochs) % np.uint64(full + 1)).astype(np.int64)
        into_short = places - short_starts * self.block_size
        samples = full * self.block_size + into_short
        regular = np.flatnonzero((into_short < 0) | (into_short >= rest))
        if regular.size:
            shifted = places[regular] - np.where(into_short[regular] >= rest, rest, 0)
            blocks, within = np.divmod(shifted, self.block_size)
            keys = counter_hash(self.seed, _BLOCK_STREAM, epochs[regular])
            samples[regular] = permuted(blocks, full, keys) * self.block_size + within
        return samples


@dataclass(frozen=True)
class Window:
    """A stretch of positions whose samples lie next to each other, block by block.

    Attributes: ``order``; ``start``, its first position there; ``first``, which sample of the whole data set is the
    first one of the order.
    """

    order: BlockOrder
    start: int
    first: int = 0

    def runs(self) -> list[tuple[int, int]]:
        """Its samples, in the order of the blocks, as [start, stop) runs."""
        return [(self.first + start, self.first + stop) for start, stop in self.order.runs(self.start)]
