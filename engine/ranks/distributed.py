"""The ranks of a run: torch.distributed set up as torchrun describes it, or one rank alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from .. import device as devices
from . import affinity, failures
from .watchdog import Heartbeat, Watchdog


@dataclass(frozen=True)
class World:
    """This process's place among the ranks.

    Attributes:
        rank: 0 … size − 1.
        size: number of ranks, W.
        device: where this rank computes.
        heartbeat: where the work says how far it is, see ``Watchdog``.
    """

    rank: int
    size: int
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over all ranks. A collective on the host: the device is not waited for."""
        told = torch.tensor(values)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return told.tolist()


@contextmanager
def start(
    timeout_seconds: float = 600.0, device: torch.device | None = None, *, bind_to_cores: bool = True
) -> Iterator[World]:
    """Joins the process group (nccl for GPUs, gloo for the host), and leaves it at the end.

    Reads torchrun's environment variables; without them the world is this process alone.

    Args:
        timeout_seconds: how long the run may stand still before the ranks' watchdogs end it.
        device: where this rank computes; the GPU of its number where there are GPUs when None.
        bind_to_cores: keep this process on the cores near its device, see ``affinity.bind``.

    Raises:
        UsageError: there are more ranks than GPUs.
        PeerFailed: another rank failed before, and this one could not go on.
        TimeoutError: the ranks did not meet.
    """
    device = devices.local_device() if device is None else device
    devices.use(device)
    if bind_to_cores:
        affinity.bind(device)
    # The watchdogs end a run that stands still, and know who is to blame; a collective waits longer than they do.
    timeout = timedelta(seconds=max(7200.0, 2 * timeout_seconds))
    if "WORLD_SIZE" in os.environ:
        store, rank, size = _meet(timeout_seconds)
        store.set_timeout(timeout)
    else:
        store, rank, size = dist.HashStore(), 0, 1
    between_ranks = dist.PrefixStore("pfc", store.clone())  # its own connection: another's waiting does not block it
    world = World(rank, size, device)
    watchdog = Watchdog(world.heartbeat, between_ranks, rank, size, timeout_seconds)
    watchdog.start()
    world.heartbeat.enter("joining the other ranks")
    try:
        dist.init_process_group(
            devices.backend(device),
            timeout=timeout,
            store=dist.PrefixStore("default_pg", store),
            rank=rank,
            world_size=size,
        )
        yield world
    except Exception as error:
        # The group is left standing: the others would fail on the closed connection before this rank's own error is
        # told. So is the watchdog, for whatever may keep the process from ending.
        world.heartbeat.enter("ending after an error")
        blamed = failures.blame(error, between_ranks, rank)
        if blamed is error:
            raise
        raise blamed from None
    dist.destroy_process_group()
    watchdog.stop()


def _meet(timeout_seconds: float) -> tuple[dist.Store, int, int]:
    """The ranks' common store, this one's rank, and their number. There is no watchdog yet, so it takes time itself."""
    try:
        return next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TimeoutError(
            f"the ranks did not meet at {address} within {timeout_seconds:g} s: is every rank started, does this host "
            f"name resolve on every host, is the port open? ({' '.join(str(error).split())})"
        ) from error
