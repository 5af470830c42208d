"""The sharded matrix of class centers: which rows are this rank's, how they begin, how they are read and written."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from .exchange import Exchange

_INIT_BLOCK = 4096  # rows drawn from one generator
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


def initial_rows(shard: ClassShard, dim: int, seed: int, dtype: torch.dtype) -> Tensor:
    """The shard's first centers [rows, D] on the CPU, normally distributed with standard deviation 0.01.

    Each block of 4096 rows has a generator of its own, seeded by (seed, block), so that the same centers begin whatever
    the number of ranks, and no two rows are drawn from the same numbers.
    """
    rows = torch.empty(shard.rows, dim, dtype=dtype)
    for block in range(shard.start // _INIT_BLOCK, -(-shard.stop // _INIT_BLOCK)):
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + block) & 0x7FFFFFFFFFFFFFFF)
        drawn = torch.empty(_INIT_BLOCK, dim).normal_(0.0, _INIT_STD, generator=generator)
        first = block * _INIT_BLOCK
        start, stop = max(first, shard.start), min(first + _INIT_BLOCK, shard.stop)
        rows[start - shard.start : stop - shard.start] = drawn[start - first : stop - first]
    return rows


def write_rows(rows: Tensor, shard: ClassShard, source: Tensor | Callable[[int, int], Tensor]) -> None:
    """Copies this shard's part of ``source`` into ``rows`` [rows, D], in place.

    Args:
        source: all centers [C, D], the same on every rank; or a function that returns classes [start, stop) as
            [stop − start, D], asked for a block at a time, so that no rank ever holds all of them.

    Raises:
        ValueError: the shape does not fit.
    """
    num_classes, dim = shard.num_classes, rows.shape[1]
    if isinstance(source, Tensor):
        if source.shape != (num_classes, dim):
            raise ValueError(f"centers must be [{num_classes}, {dim}], found {list(source.shape)}")
        rows.copy_(source[shard.start : shard.stop])
        return
    for start in range(shard.start, shard.stop, _INIT_BLOCK):
        stop = min(start + _INIT_BLOCK, shard.stop)
        block = source(start, stop)
        if block.shape != (stop - start, dim):
            raise ValueError(
                f"centers of classes {start} to {stop} must be [{stop - start}, {dim}], found {list(block.shape)}"
            )
        rows[start - shard.start : stop - shard.start] = block


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
