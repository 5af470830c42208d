"""Which processor cores a rank runs on: on a machine with several NUMA nodes, those near its GPU."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from .. import device as devices

_SYSTEM = Path("/sys")
_cores: int | None = None


def cores_of_rank() -> int:
    """Cores that this rank may count on: its share of those that all ranks of this machine have."""
    return max(1, (_cores or len(os.sched_getaffinity(0))) // _ranks_here())


def bind(device: torch.device, system: Path = _SYSTEM) -> set[int] | None:
    """Keep this process on the cores of one NUMA node, where there are several ranks and several nodes here.

    A rank with a GPU gets the node that its GPU is at; ranks without one are dealt out evenly, if there are at least
    as many as nodes. Only cores that this process may use count: a binding by Slurm or numactl stays as it is where it
    leaves one node alone.

    Args:
        device: where this rank computes.
        system: where the kernel tells about the machine.

    Returns:
        The cores, or None where nothing was changed.
    """
    global _cores
    allowed = os.sched_getaffinity(0)
    _cores = _cores or len(allowed)  # also where this process was bound before
    nodes = _nodes(system, allowed)
    rank, ranks = int(os.environ.get("LOCAL_RANK", 0)), _ranks_here()
    if len(nodes) < 2 or ranks < 2:
        return None
    if device.type == "cpu":
        if ranks < len(nodes):
            return None
        node = sorted(nodes)[rank % ranks * len(nodes) // ranks]
    else:
        address = devices.pci_address(device)
        node = _number(system / "bus/pci/devices" / address / "numa_node") if address else None
    cores = nodes.get(-1 if node is None else node)
    if not cores:
        return None
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread.name), cores)
    return cores


def _ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _nodes(system: Path, allowed: set[int]) -> dict[int, set[int]]:
    """The allowed cores of each NUMA node that has any."""
    found = {}
    for path in (system / "devices/system/node").glob("node[0-9]*"):
        with suppress(OSError, ValueError):
            cores = _listed((path / "cpulist").read_text()) & allowed
            if cores:
                found[int(path.name.removeprefix("node"))] = cores
    return found


def _listed(text: str) -> set[int]:
    """The numbers of a list such as 0-3,8,10-11."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return {number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
