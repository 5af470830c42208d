"""Bytes that a rank sends to the others in a step, and that pass between its device, the host's memory and the disk."""

import math
from dataclasses import dataclass

from .backbone import BackboneCost
from .machine import Machine
from .setup import Setup

_PAGE = 4096  # bytes that a disk reads and writes at least


@dataclass(frozen=True)
class Collective:
    """One kind of exchange between the ranks in a step.

    Attributes:
        name: of the data; kind: torch.distributed's name.
        bytes: of the whole tensor; sent: by each rank, and as many received, where they stand in a ring.
        times: how often in a step.
        seconds: of all times together.
    """

    name: str
    kind: str
    bytes: float
    sent: float
    times: int
    seconds: float


def collectives(setup: Setup, machine: Machine, backbone: BackboneCost, *, halved: bool = False) -> list[Collective]:
    """All of a step, but for the few numbers by which the ranks agree whether to stop or to save.

    Args:
        halved: whether the backbone's gradients travel in bfloat16.
    """
    ranks, batch, passes = setup.ranks, setup.global_batch, setup.accumulate
    to, back = setup.payload
    each = [
        ("embeddings and labels", "all_gather", batch * (setup.dim * to + 8), 1, passes),
        ("numbers of each sample", "all_reduce", 8 * setup.numbers * batch, 2, passes),
        ("own cosines before", "all_reduce", 8 * batch, 2, passes if setup.early else 0),
        ("nearest negatives", "all_gather", 4 * setup.nearest * ranks * batch, 1, passes if setup.nearest else 0),
        ("gradients of embeddings", "reduce_scatter", (batch * setup.dim + ranks) * back, 1, passes),
        ("gradients of the backbone", "all_reduce", backbone.parameters // (2 if halved else 1), 2, 1),
    ]
    rate = machine.inside
    if ranks > machine.per_node:  # a ring crosses from machine to machine on all of their links at once
        rate = min(rate, machine.network * machine.per_node)
    latency = machine.latency * math.ceil(math.log2(ranks)) if ranks > 1 else 0.0
    found = []
    for name, kind, size, rounds, times in each:
        sent = rounds * size * (ranks - 1) / ranks
        found.append(Collective(name, kind, size, sent, times, times * (sent / rate + latency)))
    return [one for one in found if one.times]


@dataclass(frozen=True)
class Transfer:
    """What a step of a rank moves to and from centers outside the device.

    Attributes:
        fetched, written: bytes of rows.
        disk: bytes that the disk reads and writes, for all ranks of the machine.
        seconds: of the slowest of link, disk and the cores that copy; on a CPU the cores that compute.
    """

    fetched: float = 0.0
    written: float = 0.0
    disk: float = 0.0
    seconds: float = 0.0


def transfer(setup: Setup, machine: Machine, host: float) -> Transfer:
    """That of a step. The system's cache holds as much of a file as the machine's memory has room for.

    Args:
        host: bytes of the host's memory that a rank takes.
    """
    if setup.storage == "device":
        return Transfer()
    stepped = setup.stepped_rows
    if setup.staged:
        fetched = setup.accumulate * setup.rows * setup.row_bytes
    else:  # blocks of all rows: the centers for each forward pass, centers and state for the update
        fetched = setup.shard * (setup.accumulate * setup.center_bytes + setup.row_bytes)
    written = stepped * setup.row_bytes
    if machine.gpu:
        seconds = max(max(fetched, written) / machine.host_link, (fetched + written) / machine.host_copy)
    else:
        seconds = 2 * (fetched + written) / machine.scattered if setup.staged else 0.0
    disk, here = 0.0, machine.ranks_here(setup.ranks)
    if setup.storage == "file":
        whole = setup.shard * setup.row_bytes * here
        cached = max(0.0, machine.host_memory - host * here)
        missed = max(0.0, 1 - cached / whole)
        pages = max(_PAGE, setup.row_bytes) if setup.staged else setup.row_bytes
        disk = missed * here * 2 * stepped * pages
    return Transfer(fetched, written, disk, max(seconds, disk / machine.disk))
