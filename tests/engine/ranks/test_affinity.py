"""Cores of a rank, by what the kernel tells about the machine's NUMA nodes."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pfc.engine import device as devices
from pfc.engine.ranks import affinity

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """A process that may use the cores 0 to 15; the cores that it is bound to."""
    cores: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, given: cores.append(set(given)))
    monkeypatch.setattr(affinity, "_cores", None)
    return cores


def machine(folder: Path, nodes: dict[int, str], gpus: dict[str, int] | None = None) -> Path:
    """What /sys says of NUMA nodes with these lists of cores, and of PCI devices at these nodes."""
    for number, cores in nodes.items():
        (folder / f"devices/system/node/node{number}").mkdir(parents=True)
        (folder / f"devices/system/node/node{number}/cpulist").write_text(cores + "\n")
    for address, node in (gpus or {}).items():
        (folder / "bus/pci/devices" / address).mkdir(parents=True)
        (folder / "bus/pci/devices" / address / "numa_node").write_text(f"{node}\n")
    return folder


def ranks(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))


def at_pci(monkeypatch: pytest.MonkeyPatch, domain: int, bus: int, place: int) -> None:
    about = SimpleNamespace(pci_domain_id=domain, pci_bus_id=bus, pci_device_id=place)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about if device == GPU else None)


def test_a_rank_gets_the_cores_of_its_gpus_node(
    bound: list[set[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = machine(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15"}, {"0000:3b:00.0": 1})
    at_pci(monkeypatch, 0, 0x3B, 0)
    ranks(monkeypatch, 1, 4)
    expected = {4, 5, 6, 7, 12, 13, 14, 15}
    assert affinity.bind(GPU, system) == expected
    assert bound
    assert all(cores == expected for cores in bound)  # of all threads
    assert affinity.cores_of_rank() == 4  # of 16, whatever it is bound to


@pytest.mark.parametrize(("rank", "expected"), [(0, range(8)), (1, range(8)), (2, range(8, 16)), (3, range(8, 16))])
def test_ranks_without_gpus_are_dealt_out(
    rank: int, expected: range, bound: list[set[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(monkeypatch, rank, 4)
    assert affinity.bind(CPU, machine(tmp_path, {0: "0-7", 1: "8-15"})) == set(expected)


@pytest.mark.parametrize(
    ("nodes", "size", "gpu_node"),
    [
        pytest.param({0: "0-15"}, 4, 0, id="one node"),
        pytest.param({0: "0-7", 1: "16-31"}, 4, 0, id="one node that may be used"),
        pytest.param({0: "0-7", 1: "8-15"}, 1, 0, id="one rank, which may want all cores"),
        pytest.param({0: "0-7", 1: "8-15"}, 4, -1, id="the kernel does not know the GPU's node"),
        pytest.param({}, 4, 0, id="no NUMA"),
    ],
)
def test_nothing_changes_where_there_is_no_choice(
    nodes: dict[int, str],
    size: int,
    gpu_node: int,
    bound: list[set[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_pci(monkeypatch, 0, 0, 0)
    ranks(monkeypatch, 0, size)
    assert affinity.bind(GPU, machine(tmp_path, nodes, {"0000:00:00.0": gpu_node})) is None
    assert bound == []


def test_fewer_ranks_than_nodes_keep_all_cores(
    bound: list[set[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(monkeypatch, 1, 2)
    assert affinity.bind(CPU, machine(tmp_path, {0: "0-3", 1: "4-7", 2: "8-11", 3: "12-15"})) is None


def test_pytorch_tells_a_gpus_pci_address() -> None:
    assert {"pci_domain_id", "pci_bus_id", "pci_device_id"} <= set(dir(torch._C._CudaDeviceProperties))
    assert devices.pci_address(CPU) is None
