"""Which classes, and which part of the batch, a step uses.

A sample is a function of (seed, step) and of the batch's labels, never of the number of ranks: the class ids are cut
into fixed blocks of 4096, each block gives the first ids of a keyed permutation of itself, and every rank computes the
blocks that its shard touches. No list is shuffled and nothing is as long as the shard, so the cost is that of the
sample, O(K). See docs/sampling.md.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .centers import ClassShard
from .permutation import hash64, mix, permute

_BLOCK_BITS = 12
_BLOCK = 1 << _BLOCK_BITS
_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class ClassSample:
    """The classes that this rank uses in one step.

    Attributes:
        shard: the classes that this rank stores.
        rows: their places in the shard, int64 [K], ascending, each once; None when they are all of the shard's rows.
            Of a sample with fixed shapes in any order, with −1 here and there, which is no row.
        columns: for each sample of the global batch the place of its class among ``rows``, int64 [B]; −1 where the
            class lives on another rank.
        draw: of a sample with fixed shapes, how many places of ``rows`` each block of classes has.
    """

    shard: ClassShard
    rows: Tensor | None
    columns: Tensor
    draw: "Draw | None" = None

    @cached_property
    def classes(self) -> Tensor:
        """Their global ids, int64 [K], ascending; computed at the first access."""
        if self.rows is None:
            return torch.arange(self.shard.start, self.shard.stop, device=self.columns.device)
        return self.rows[self.rows >= 0].sort().values + self.shard.start


@dataclass(frozen=True)
class LastSample:
    """What the last step used on this rank.

    Attributes:
        sample: its classes.
        batch: places in the global batch that met the negatives, int64, ascending.
    """

    sample: ClassSample
    batch: Tensor

    @property
    def classes(self) -> Tensor:
        """Global class ids, int64 [K], ascending; on the host, where the centers are not on the device."""
        return self.sample.classes


def sample_classes(
    labels: Tensor,
    shard: ClassShard,
    *,
    rate: float,
    seed: int,
    step: int,
    fixed: bool = False,
    negatives: Tensor | None = None,
) -> ClassSample:
    """The classes of one step on one shard: a random share ``rate`` of them, and the batch's own.

    Every class is equally likely to be among the random ones, with probability exactly ``rate``, without replacement;
    classes of the batch join, each once.

    Args:
        labels: classes of the global batch, int64 [B].
        shard: the classes that this rank stores.
        rate: in (0, 1]; 1 takes every class.
        seed: of the run.
        step: any integer; another step, another sample.
        fixed: whether shapes must follow from all but the labels, for a GPU: the same classes, with padding.
        negatives: what ``negative_rows`` gave for this step, where it is known already.
    """
    mine = (labels >= shard.start) & (labels < shard.stop)
    if rate >= 1.0:
        return ClassSample(shard, None, torch.where(mine, labels - shard.start, -1))
    if fixed and shard.rows:
        return _fixed_sample(labels, mine, shard, Draw.of(shard, rate, seed, step))
    draw = _random_classes(shard, rate, seed, step, labels.device) if negatives is None else negatives + shard.start
    nothing = labels.new_full((1,), -1)
    # Filtered after sorting, by the −1 that always leads: on a GPU the host then waits once, for how many there are.
    classes = torch.cat([nothing, draw, torch.where(mine, labels, -1)]).unique()[1:]
    return ClassSample(shard, classes - shard.start, torch.where(mine, torch.searchsorted(classes, labels), -1))


def expected_rows(classes: int, ranks: int, rate: float, batch: int) -> float:
    """K of the rank with most rows: the share ``rate`` of its classes, and of the others those that the batch brings.

    The batch's labels are drawn uniformly, so one class is missing from it with probability (1 − 1/C)^B.
    """
    here = -(-classes // ranks)
    return here * (rate + (1 - rate) * (1 - (1 - 1 / classes) ** batch))


def negative_rows(shard: ClassShard, *, rate: float, seed: int, step: int) -> Tensor:
    """Places in the shard of a step's random classes, int64 [n] on the host, ascending: without those of its batch."""
    classes = _random_classes(shard, rate, seed, step, torch.device("cpu"))
    return classes[classes >= 0].sort().values - shard.start


def sample_batch(
    size: int, *, rate: float, seed: int, step: int, device: torch.device, fixed: bool = False
) -> Tensor | None:
    """The part of the global batch that meets the negatives (D-Softmax-B): ⌈rate·size⌉ places, int64, ascending.

    None stands for the whole batch. ``fixed`` as in ``sample_classes``.
    """
    if rate >= 1.0:
        return None
    count = _share(rate, size)
    key = hash64(hash64(seed, 1), step) & _MASK32
    if fixed:
        from .kernels.fused.draw import permuted

        return permuted(count, size, key, device).sort().values
    return _permuted(count, size, torch.tensor(key), device).sort().values


@dataclass(frozen=True)
class Draw:
    """How many random classes each block of a shard gives in a step.

    Block by block ⌊rate·end + u⌋ − ⌊rate·start + u⌋ ids with one random u per step: on average exactly rate times the
    block, so that no class is favoured by rounding, and in all blocks together rate·C to within one.

    Attributes:
        key: of the step, 32 bits.
        first: the shard's first block; last: its last.
        most: no block gives more.
    """

    rate: float
    u: float
    key: int
    first: int
    last: int
    most: int
    num_classes: int

    @classmethod
    def of(cls, shard: ClassShard, rate: float, seed: int, step: int) -> "Draw":
        key = hash64(hash64(seed, 0), step)
        first, last = shard.start >> _BLOCK_BITS, (shard.stop - 1) >> _BLOCK_BITS
        u = (hash64(key, 0) >> 11) / (1 << 53)
        most = min(_share(rate, _BLOCK) + 1, _BLOCK)  # one more for u
        return cls(rate, u, key & _MASK32, first, last, most, shard.num_classes)

    @property
    def total(self) -> int:
        """What the blocks give together."""
        return self.place(self.last + 1)

    def place(self, block: int) -> int:
        """Where among the step's places those of a block begin; behind the last block's stand those of the batch."""
        return self._floor(block) - self._floor(self.first)

    def _floor(self, block: int) -> int:
        return math.floor(self.rate * min(block << _BLOCK_BITS, self.num_classes) + self.u)

    def bounds(self, device: torch.device) -> Tensor:
        """⌊rate·edge + u⌋ at the blocks' edges, int64 [blocks + 1]."""
        edges = torch.arange(self.first, self.last + 2, device=device) << _BLOCK_BITS
        return torch.floor(self.rate * edges.clamp_max(self.num_classes).double() + self.u).long()


def _random_classes(shard: ClassShard, rate: float, seed: int, step: int, device: torch.device) -> Tensor:
    """Global ids of the random classes that fall into the shard, int64, in no particular order, with −1 between."""
    if shard.rows == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    draw = Draw.of(shard, rate, seed, step)
    blocks = torch.arange(draw.first, draw.last + 1, device=device)
    starts = blocks << _BLOCK_BITS
    counts = draw.bounds(device).diff()
    keys = mix(blocks + draw.key)
    place = torch.arange(draw.most, device=device)
    grid = starts[:, None] + permute(place.expand(len(starts), -1), _BLOCK, keys[:, None])
    size = shard.num_classes - (draw.last << _BLOCK_BITS)
    if size < _BLOCK:  # the last block of all is shorter and has a permutation of its own
        key = mix(torch.tensor(draw.last + draw.key))
        grid[-1, :size] = starts[-1] + _permuted(min(draw.most, size), size, key, device)
    chosen = (place < counts[:, None]) & (grid >= shard.start) & (grid < shard.stop)
    return torch.where(chosen, grid, -1).flatten()


def _permuted(count: int, size: int, key: Tensor, device: torch.device) -> Tensor:
    """The first ``count`` values of a permutation of [0, size), computed on the host, which knows all they depend on.

    The walk along a cycle tests on the host whether it has ended, which on a GPU would be a synchronisation.
    """
    return permute(torch.arange(count), size, key).to(device, non_blocking=True)


def _fixed_sample(labels: Tensor, mine: Tensor, shard: ClassShard, draw: Draw) -> ClassSample:
    """The same classes in a shape that the step and the shard alone decide.

    First stand the ids that the shard's blocks give, −1 for those of another shard's part of a block; then one place
    for each of the batch, −1 where its class is another rank's, or stands before.
    """
    from .kernels.fused.draw import draw as draw_classes

    size = len(labels)
    rows = labels.new_empty(draw.total + size)
    bounds = draw.bounds(labels.device)
    found = draw_classes(
        rows,
        labels,
        bounds - bounds[0],
        first_block=draw.first,
        block_bits=_BLOCK_BITS,
        most=draw.most,
        shard=(shard.start, shard.stop),
        num_classes=shard.num_classes,
        key=draw.key,
    )
    # Of equal labels the first in the batch has the place.
    ascending, order = labels.sort(stable=True)
    first = torch.empty_like(order)
    first[order] = order[torch.searchsorted(ascending, ascending)]
    here = torch.arange(size, device=labels.device)
    joins = mine & (found < 0)
    rows[draw.total :] = torch.where(joins & (first == here), labels - shard.start, -1)
    columns = torch.where(joins, draw.total + first, found)  # of another rank's class nothing is found: −1
    return ClassSample(shard, rows, columns, draw)


def _share(rate: float, size: int) -> int:
    """⌈rate·size⌉, at least 1; a product that is whole but for rounding (0.1·30 > 3) counts as whole."""
    return max(1, math.ceil(rate * size - 1e-9))
