"""The sharded matrix of class centers: which rows are this rank's, how they are initialised, read and written."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from .exchange import Exchange
from .permutation import hash64

_BLOCK = 4096  # rows drawn from one generator, or read at a time
_INIT_STD = 0.01


@dataclass(frozen=True)
class ClassShard:
    """The classes [start, stop) of one rank: ⌈C/W⌉ each, the last ranks fewer or none, as torch.chunk and DTensor cut.

    Attributes:
        num_classes: C, over all ranks.
        start: first class of this rank.
        stop: one past its last.
    """

    num_classes: int
    start: int
    stop: int

    @classmethod
    def of(cls, num_classes: int, rank: int, world_size: int) -> "ClassShard":
        size = -(-num_classes // world_size)
        return cls(num_classes, min(rank * size, num_classes), min((rank + 1) * size, num_classes))

    @property
    def rows(self) -> int:
        return self.stop - self.start


def fill_initially(
    rows: Tensor, shard: ClassShard, seed: int, progress: Callable[[int, int], None] | None = None
) -> None:
    """The shard's first centers, into ``rows``: normally distributed with standard deviation 0.01.

    Each block of 4096 rows has a generator of its own, seeded by (seed, block), so that the same centers begin whatever
    the number of ranks, and no two rows are drawn from the same numbers. The host draws them, so that they are the same
    on every device, a block at a time on each of torch's threads, and holds no more of them.

    Args:
        rows: [rows, ...] of any dtype and device.
        shard: which classes they are.
        seed: of the run.
        progress: is told how many rows are there, and how many there will be.
    """

    def fill(block: int) -> int:
        generator = torch.Generator().manual_seed(hash64(hash64(seed, 2), block) & 0x7FFFFFFFFFFFFFFF)
        drawn = torch.empty(_BLOCK, *rows.shape[1:], device="cpu").normal_(0.0, _INIT_STD, generator=generator)
        first = block * _BLOCK
        start, stop = max(first, shard.start), min(first + _BLOCK, shard.stop)
        rows[start - shard.start : stop - shard.start] = drawn[start - first : stop - first]
        return stop - start

    done = 0
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for count in pool.map(fill, range(shard.start // _BLOCK, -(-shard.stop // _BLOCK))):
            done += count
            if progress is not None:
                progress(done, shard.rows)


def write_rows(
    rows: Tensor, shard: ClassShard, source: Tensor | Callable[[int, int], Tensor], classes: Tensor | None
) -> None:
    """Copies this shard's part of ``source`` into ``rows`` [rows, D] (or [rows, S, D]), in place.

    Args:
        source: centers [N, D], the same on every rank; or a function that returns those of [start, stop) as
            [stop − start, D], asked for a block of at most 4096 at a time, so that no rank ever holds all of them.
        classes: for each class its row in the source, int64 [C], −1 for a class that is not there and keeps its row;
            None where the source has the same classes, N = C.

    Raises:
        ValueError: a shape, or a row of the source, does not fit.
    """
    num_classes, shape = shard.num_classes, rows.shape[1:]
    sizes = ", ".join(map(str, shape))
    size = len(source) if isinstance(source, Tensor) else None
    if isinstance(source, Tensor) and source.shape != (num_classes if classes is None else size, *shape):
        expected = num_classes if classes is None else "N"
        raise ValueError(f"centers must be [{expected}, {sizes}], found {list(source.shape)}")
    if classes is None:
        order, ascending = None, torch.arange(shard.start, shard.stop)
    else:
        if classes.shape != (num_classes,) or classes.dtype != torch.int64:
            raise ValueError(f"classes must be int64 [{num_classes}], found {list(classes.shape)} {classes.dtype}")
        size = int(classes.max()) + 1 if size is None else size
        if classes.min() < -1 or classes.max() >= size:
            raise ValueError(f"classes must lie in [-1, {size}), found {int(classes.min())} to {int(classes.max())}")
        ascending, order = classes[shard.start : shard.stop].cpu().sort()
    blocks = torch.unique_consecutive(ascending[ascending >= 0] // _BLOCK)
    edges = torch.stack([blocks, blocks + 1]) * _BLOCK
    for start, first, last in zip(edges[0].tolist(), *torch.searchsorted(ascending, edges).tolist(), strict=True):
        stop = min(start + _BLOCK, num_classes if size is None else size)
        values = source[start:stop] if isinstance(source, Tensor) else source(start, stop)
        if values.shape != (stop - start, *shape):
            found = list(values.shape)
            raise ValueError(f"centers of classes {start} to {stop} must be [{stop - start}, {sizes}], found {found}")
        taken = values[(ascending[first:last] - start).to(values.device)].to(rows.device, rows.dtype)
        rows[slice(first, last) if order is None else order[first:last].to(rows.device)] = taken


def read_rows(rows: Tensor, shard: ClassShard, value: Tensor) -> None:
    """Copies a checkpoint's value, a DTensor of this layout or a full tensor [C, ...], into this shard's rows."""
    if value.shape[0] != shard.num_classes or value.shape[1:] != rows.shape[1:]:
        raise ValueError(f"expected {[shard.num_classes, *rows.shape[1:]]}, found {list(value.shape)}")
    rows.copy_(value.to_local() if isinstance(value, DTensor) else value[shard.start : shard.stop])


def as_dtensor(rows: Tensor, num_classes: int, exchange: Exchange) -> DTensor:
    """Per-class numbers [rows, ...] of every rank as one DTensor [C, ...], Shard(0), that shares their memory."""
    device = rows.device.type
    if exchange.group is None:  # one process without torch.distributed: a mesh of one that needs no backend
        mesh = DeviceMesh(device, [0], _init_backend=False, _rank=0)
    else:
        mesh = DeviceMesh.from_group(exchange.group, device)
    shape = torch.Size((num_classes, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
