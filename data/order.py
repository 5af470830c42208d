"""The order in which training sees the samples: a keyed permutation of the data set for every epoch.

``SampleOrder`` computes the permutation instead of storing it. A Feistel network over the smallest power of
two that holds N is a bijection whatever its round function; values that land outside [0, N) are sent
through it again until they fall inside (cycle-walking), which leaves a bijection on [0, N). Memory is O(1),
any position can be asked for directly, and the order depends on (seed, epoch) alone, so every world size
sees the same one.
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF


def counter_hash(seed: int, *counters: NDArray[np.int64] | int) -> NDArray[np.uint64]:
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


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: a bijection of 64-bit words; every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class SampleOrder:
    """The global order of samples: the epochs' permutations of [0, N), one after the other, without end.

    Position p belongs to epoch p // N; over the N positions of an epoch every sample comes exactly once.

    Args:
        num_samples: N ≥ 1.
        seed: another seed, another order.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        bits = max(1, (num_samples - 1).bit_length())
        self._low_bits = np.uint64((bits + 1) // 2)
        self._low_mask = np.uint64((1 << ((bits + 1) // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits // 2)) - 1)

    def epoch(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The epoch that each position belongs to: int64, the shape of ``positions``."""
        return np.asarray(positions, dtype=np.int64) // self.num_samples

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at the given global positions.

        Args:
            positions: int64 [n], each ≥ 0; they may lie in different epochs.

        Returns:
            int64 [n], each in [0, N).
        """
        positions = np.asarray(positions, dtype=np.int64)
        keys = counter_hash(self.seed, self.epoch(positions))
        values = self._permute((positions % self.num_samples).astype(np.uint64), keys)
        outside = np.flatnonzero(values >= self.num_samples)
        while outside.size:
            values[outside] = self._permute(values[outside], keys[outside])
            outside = outside[values[outside] >= self.num_samples]
        return values.astype(np.int64)

    def _permute(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """One pass through the Feistel network: a bijection of the power of two, keyed per element."""
        high = values >> self._low_bits
        low = values & self._low_mask
        for round_index in range(0, _ROUNDS, 2):
            # The halves may differ by a bit, so they are not swapped: each round changes the other one.
            high = high ^ (_mix(keys + low + np.uint64(_round_constant(round_index))) & self._high_mask)
            low = low ^ (_mix(keys + high + np.uint64(_round_constant(round_index + 1))) & self._low_mask)
        return (high << self._low_bits) | low


def _round_constant(round_index: int) -> int:
    return ((round_index + 1) * _GOLDEN) & _WORD
