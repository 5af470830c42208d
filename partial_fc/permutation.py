"""Counter-based random numbers: hashes, and keyed permutations that are evaluated at single places."""

import torch
from torch import Tensor

ROUNDS = 8  # up to 4 let some pairs of a small block meet measurably more often than others; the rest is margin
_FEWEST_BITS = 5  # below, a Feistel network is measurably uneven
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def bits_of(size: int) -> int:
    """Width in bits of the network that permutes [0, size)."""
    return max(_FEWEST_BITS, (size - 1).bit_length())


def permute(places: Tensor, size: int, key: Tensor) -> Tensor:
    """A keyed permutation of [0, size), for each of the given places at once.

    A Feistel network on ⌈log₂ size⌉ bits, at least 5; where that reaches beyond ``size``, the walk along the cycle goes
    on until it comes back inside.

    Args:
        places: int64 [..., n], each in [0, size).
        size: ≥ 1.
        key: int64, one for all or [..., 1]; 32 bits of it count.
    """
    bits = bits_of(size)
    keys = mix(key + torch.arange(1, 2 * ROUNDS, 2, device=key.device).view(-1, *[1] * key.ndim)).unbind()
    if size == 1 << bits:
        return _feistel(places, bits, keys)
    onward = _feistel(torch.arange(1 << bits, device=key.device), bits, keys)  # a look-up is cheaper than the network
    places = onward.take_along_dim(places, dim=-1)
    while bool((outside := places >= size).any()):
        places = torch.where(outside, onward.take_along_dim(places, dim=-1), places)
    return places


def _feistel(values: Tensor, bits: int, keys: tuple[Tensor, ...]) -> Tensor:
    low_bits = bits // 2
    high_bits = bits - low_bits
    high, low = values >> low_bits, values & ((1 << low_bits) - 1)
    for index, key in enumerate(keys):
        # The halves change sides by turns, so each is changed by the other; both stay as wide as they are.
        if index % 2 == 0:
            high = high ^ (mix(low + key) & ((1 << high_bits) - 1))
        else:
            low = low ^ (mix(high + key) & ((1 << low_bits) - 1))
    return (high << low_bits) | low


def mix(values: Tensor) -> Tensor:
    """A 32-bit hash of int64 values, element by element: every output bit depends on every input bit."""
    values = values & _MASK32
    values = ((values ^ (values >> 16)) * 0x7FEB352D) & _MASK32
    values = ((values ^ (values >> 15)) * 0x846CA68B) & _MASK32
    return values ^ (values >> 16)


def hash64(value: int, more: int) -> int:
    """A 64-bit hash of two integers (the finaliser of SplitMix64, twice)."""
    state = value & _MASK64
    for word in (0x9E3779B97F4A7C15, more & _MASK64):
        state = (state + word) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state
