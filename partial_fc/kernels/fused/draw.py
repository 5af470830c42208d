"""The class sample on a GPU: what ``sampling.py`` draws, in two launches, with fixed shapes and without a search.

The permutation of ``permutation.py`` runs inside: forwards for the ids that a block gives, backwards for the classes of
the batch, since a class is among the random ones exactly where its place in its block's permutation is below the
block's count. So nothing is sorted, and the host never waits for the number of classes.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Triton's language is not the Python that a type checker knows.

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...device import selected
from ...permutation import ROUNDS, bits_of

_ROUNDS = tl.constexpr(ROUNDS)
_PLACES = 512  # of a block, per program


def draw(
    rows: Tensor,
    labels: Tensor,
    offsets: Tensor,
    *,
    first_block: int,
    block_bits: int,
    most: int,
    shard: tuple[int, int],
    num_classes: int,
    key: int,
) -> Tensor:
    """Fills ``rows`` with the random classes of the shard, and finds the batch's own among them.

    Args:
        rows: int64 [≥ offsets[-1]]; gets places in the shard, −1 for a class that is another shard's.
        labels: int64 [B].
        offsets: where in ``rows`` each block's ids begin, and where the last one's end, int64 [blocks + 1].
        first_block: the block that ``offsets`` begins with; block_bits: of the size of a block.
        most: no block gives more ids.
        shard: its first class, and one past its last.
        key: of the step, 32 bits.

    Returns:
        Where in ``rows`` the class of each sample stands, int64 [B]; −1 where it was not drawn.
    """
    found = torch.empty_like(labels)
    blocks, (start, stop) = len(offsets) - 1, shard
    last_size = (num_classes - 1) % (1 << block_bits) + 1
    sizes = {"last_block": (num_classes - 1) >> block_bits, "last_size": last_size, "last_bits": bits_of(last_size)}
    with selected(labels.device):
        draw_kernel[(blocks, triton.cdiv(most, _PLACES))](
            rows, offsets, first_block, start, stop, key, **sizes, BITS=block_bits, PLACES=_PLACES
        )
        find_kernel[(triton.cdiv(len(labels), 128),)](
            found, labels, offsets, len(labels), first_block, start, stop, key, **sizes, BITS=block_bits, PLACES=128
        )
    return found


def permuted(count: int, size: int, key: int, device: torch.device) -> Tensor:
    """The first ``count`` values of a permutation of [0, size), int64, as ``permutation.permute`` gives them."""
    values = torch.empty(count, dtype=torch.int64, device=device)
    with selected(device):
        permute_kernel[(triton.cdiv(count, 128),)](values, count, size, bits_of(size), key, PLACES=128)
    return values


@triton.jit(do_not_specialize=["first_block", "start", "stop", "key", "last_block", "last_size", "last_bits"])
def draw_kernel(
    rows, offsets, first_block, start, stop, key, last_block, last_size, last_bits,
    BITS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    place = (tl.program_id(1) * PLACES + tl.arange(0, PLACES)).to(tl.int64)
    begin = tl.load(offsets + block)
    drawn = place < tl.load(offsets + block + 1) - begin
    block = block.to(tl.int64) + first_block
    size = tl.where(block == last_block, last_size, 1 << BITS)
    bits = tl.where(block == last_block, last_bits, BITS)
    inside = permute(tl.where(drawn, place, 0), size, bits, mix(block + key))
    row = (block << BITS) + inside
    row = tl.where((row >= start) & (row < stop), row - start, -1)
    tl.store(rows + begin + place, row, mask=drawn)


@triton.jit(do_not_specialize=["batch", "first_block", "start", "stop", "key", "last_block", "last_size", "last_bits"])
def find_kernel(
    found, labels, offsets, batch, first_block, start, stop, key, last_block, last_size, last_bits,
    BITS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    label = tl.load(labels + sample, mask=sample < batch, other=-1)
    here = (label >= start) & (label < stop)
    label = tl.where(here, label, start)
    block = label >> BITS
    size = tl.where(block == last_block, last_size, 1 << BITS)
    bits = tl.where(block == last_block, last_bits, BITS)
    place = permute_back(label & ((1 << BITS) - 1), size, bits, mix(block + key))
    begin = tl.load(offsets + block - first_block)
    drawn = here & (place < tl.load(offsets + block - first_block + 1) - begin)
    tl.store(found + sample, tl.where(drawn, begin + place, -1), mask=sample < batch)


@triton.jit(do_not_specialize=["count", "size", "bits", "key"])
def permute_kernel(values, count, size, bits, key, PLACES: tl.constexpr):
    place = (tl.program_id(0) * PLACES + tl.arange(0, PLACES)).to(tl.int64)
    inside = place < count
    zero = tl.zeros((PLACES,), dtype=tl.int64)
    tl.store(values + place, permute(tl.where(inside, place, 0), zero + size, zero + bits, zero + key), mask=inside)


@triton.jit
def permute(place, size, bits, key):
    """``permutation.permute``: the walk along the cycle ends on the device, whatever its length."""
    place = feistel(place, bits, key)
    while tl.max((place >= size).to(tl.int32), axis=0) > 0:
        place = tl.where(place >= size, feistel(place, bits, key), place)
    return place


@triton.jit
def permute_back(value, size, bits, key):
    value = feistel_back(value, bits, key)
    while tl.max((value >= size).to(tl.int32), axis=0) > 0:
        value = tl.where(value >= size, feistel_back(value, bits, key), value)
    return value


@triton.jit
def feistel(value, bits, key):
    low_bits = bits // 2
    high, low = value >> low_bits, value & ((1 << low_bits) - 1)
    for index in tl.static_range(_ROUNDS):
        high, low = feistel_round(high, low, index, bits, key)
    return (high << low_bits) | low


@triton.jit
def feistel_back(value, bits, key):
    """Each round undoes itself, so the rounds in the opposite order undo all."""
    low_bits = bits // 2
    high, low = value >> low_bits, value & ((1 << low_bits) - 1)
    for index in tl.static_range(_ROUNDS):
        high, low = feistel_round(high, low, _ROUNDS - 1 - index, bits, key)
    return (high << low_bits) | low


@triton.jit
def feistel_round(high, low, index: tl.constexpr, bits, key):
    low_bits = bits // 2
    if index % 2 == 0:
        high = high ^ (mix(low + mix(key + 2 * index + 1)) & ((1 << (bits - low_bits)) - 1))
    else:
        low = low ^ (mix(high + mix(key + 2 * index + 1)) & ((1 << low_bits) - 1))
    return high, low


@triton.jit
def mix(value):
    """``permutation.mix``, on int64."""
    value = value & 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    value = ((value ^ (value >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return value ^ (value >> 16)
