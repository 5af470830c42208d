"""The ranks of a run: torch.distributed set up as torchrun describes it, or one rank alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process's place among the ranks.

    Attributes:
        rank: 0 … size − 1.
        size: number of ranks, W.
        device: where this rank computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank. A collective on the host: the device is not waited for."""
        told = torch.tensor(int(flag))
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told)


@contextmanager
def start() -> Iterator[World]:
    """Joins the process group (nccl for GPUs, gloo for the host), and leaves it at the end.

    Reads torchrun's environment variables; without them the world is this process alone.
    """
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=_TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
    yield World(dist.get_rank(), dist.get_world_size(), device)
    # Not after an exception: the others would fail on the closed connection before this rank's own error is told.
    dist.destroy_process_group()
