"""Which classes, and which part of the batch, a step uses.

A sample is a function of (seed, step) and of the batch's labels, never of the number of ranks: the class ids are cut
into fixed blocks of 4096, each block gives the first ids of a keyed permutation of itself, and every rank computes the
blocks that its shard touches. No list is shuffled and nothing is as long as the shard, so the cost is that of the
sample, O(K). See docs/sampling.md.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .centers import ClassShard
from .permutation import hash64, mix, permute

_BLOCK_BITS = 12
_BLOCK = 1 << _BLOCK_BITS


@dataclass(frozen=True)
class ClassSample:
    """The classes that this rank uses in one step.

    Attributes:
        rows: their places in this rank's shard, int64 [K], ascending; None when they are all of the shard's rows.
        classes: their global ids, int64 [K], ascending.
        columns: for each sample of the global batch the place of its class among ``rows``, int64 [B]; −1 where the
            class lives on another rank.
    """

    rows: Tensor | None
    classes: Tensor
    columns: Tensor


def sample_classes(labels: Tensor, shard: ClassShard, *, rate: float, seed: int, step: int) -> ClassSample:
    """The classes of one step on one shard: a random share ``rate`` of them, and the batch's own.

    Every class is equally likely to be among the random ones, with probability exactly ``rate``, without replacement;
    classes of the batch join, each once.

    Args:
        labels: classes of the global batch, int64 [B].
        shard: the classes that this rank stores.
        rate: in (0, 1]; 1 takes every class.
        seed: of the run.
        step: any integer; another step, another sample.
    """
    if rate >= 1.0:
        rows, classes = None, torch.arange(shard.start, shard.stop, device=labels.device)
        place = labels - shard.start
    else:
        negatives = _random_classes(shard, rate, seed, step, labels.device)
        own = labels[(labels >= shard.start) & (labels < shard.stop)]
        classes = torch.unique(torch.cat([negatives, own]))
        rows = classes - shard.start
        place = torch.searchsorted(classes, labels)
    mine = (labels >= shard.start) & (labels < shard.stop)
    return ClassSample(rows, classes, torch.where(mine, place, -1))


def sample_batch(size: int, *, rate: float, seed: int, step: int, device: torch.device) -> Tensor | None:
    """The part of the global batch that meets the negatives (D-Softmax-B): ⌈rate·size⌉ places, int64, ascending.

    None stands for the whole batch.
    """
    if rate >= 1.0:
        return None
    count = _share(rate, size)
    key = hash64(hash64(seed, 1), step)
    places = permute(torch.arange(count, device=device), size, torch.tensor(key & 0xFFFFFFFF, device=device))
    return places.sort().values


def _random_classes(shard: ClassShard, rate: float, seed: int, step: int, device: torch.device) -> Tensor:
    """Global ids of the random classes that fall into the shard, int64, in no particular order."""
    if shard.rows == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    key = hash64(hash64(seed, 0), step)
    first, last = shard.start >> _BLOCK_BITS, (shard.stop - 1) >> _BLOCK_BITS
    starts = torch.arange(first, last + 1, device=device) << _BLOCK_BITS
    ends = (starts + _BLOCK).clamp_max(shard.num_classes)
    # Block by block ⌊rate·end + u⌋ − ⌊rate·start + u⌋ ids with one random u per step: on average exactly rate times
    # the block, so that no class is favoured by rounding, and in all blocks together rate·C to within one.
    u = (hash64(key, 0) >> 11) / (1 << 53)
    counts = torch.floor(rate * ends.double() + u).long() - torch.floor(rate * starts.double() + u).long()
    keys = mix((starts >> _BLOCK_BITS) + (key & 0xFFFFFFFF))
    place = torch.arange(min(_share(rate, _BLOCK) + 1, _BLOCK), device=device)  # one more for u
    grid = starts[:, None] + permute(place.expand(len(starts), -1), _BLOCK, keys[:, None])
    size = shard.num_classes - (last << _BLOCK_BITS)
    if size < _BLOCK:  # the last block of all is shorter and has a permutation of its own
        grid[-1, :size] = starts[-1] + permute(place[:size], size, keys[-1])
    chosen = (place < counts[:, None]) & (grid >= shard.start) & (grid < shard.stop)
    return grid[chosen]


def _share(rate: float, size: int) -> int:
    """⌈rate·size⌉, at least 1; a product that is whole but for rounding (0.1·30 > 3) counts as whole."""
    return max(1, math.ceil(rate * size - 1e-9))
