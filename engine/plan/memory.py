"""Bytes that a rank takes, part by part, and where they are: on the device, in the host's memory, on a disk."""

from dataclasses import dataclass

from .backbone import BackboneCost
from .machine import GB, Machine
from .setup import Setup

_CPU_BLOCK, _GPU_BLOCK = 1 << 20, 1 << 27  # bytes of a block of rows: partial_fc/device.py
_FUSED_NUMBERS, _UPDATE_NUMBERS = 1 << 27, 1 << 26  # of a block of the fused kernels: partial_fc/kernels/fused
_TILE = 128  # rows of a tile of the fused product
_PREFETCHED = 3  # batches of images that exist at once
_CONTEXT, _PROCESS, _CPU_PROCESS = 1.5 * GB, 3 * GB, 0.4 * GB
"""Assumed: of a GPU the driver's context, NCCL and the libraries' workspaces; of the host a process with CUDA loaded.
Measured: a process without."""


_FREED_ROWS, _FREED = 10 * 4096, 48 << 20
"""What the C library keeps of freed memory: rows in float32 that were drawn for the first centers, and at least so many
bytes (measured)."""
_SMALL = 32 << 20
"""Bytes of tensors for which the C library uses again what it has kept."""
_NOT_GIVEN_BACK = 0.4
"""Of the activations: what the C library keeps of freed tensors under 32 MiB (measured: iresnet18, mobilefacenet).
With MALLOC_MMAP_THRESHOLD_=262144 it keeps nothing, and a step takes two to four times as long."""


@dataclass(frozen=True)
class Part:
    """Bytes of one rank for one purpose."""

    name: str
    device: float = 0.0
    host: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True)
class Memory:
    """All parts of a rank, which has most of them at the same time at its peak."""

    parts: tuple[Part, ...]

    @property
    def device(self) -> float:
        return sum(part.device for part in self.parts)

    @property
    def host(self) -> float:
        return sum(part.host for part in self.parts)

    @property
    def disk(self) -> float:
        return sum(part.disk for part in self.parts)

    def fits(self, machine: Machine, ranks: int) -> bool:
        """Whether the device, and the machine with so many ranks, have so much memory and disk space."""
        on_device = self.device <= machine.memory or not machine.gpu
        return on_device and self.host * ranks <= machine.host_memory and self.disk * ranks <= machine.disk_space


@dataclass(frozen=True)
class Head:
    """Bytes of a head alone, on the device but for the stored rows."""

    centers: int
    state: int
    sampled: int
    index: int
    kept: int
    forward: int
    update: int

    @property
    def peak(self) -> int:
        """All of it, where the rows are stored in the same memory."""
        return self.centers + self.state + self.sampled + self.index + self.kept + max(self.forward, self.update)


def head_memory(setup: Setup, machine: Machine) -> Head:
    """Of a step on the rank with most rows. ``forward`` and ``update`` are what only that part of a step needs."""
    rows, batch, dim = int(setup.rows), setup.global_batch, setup.dim
    state = setup.row_bytes - setup.center_bytes
    # What the batch takes: itself, normalised, and its gradient; and of the samples whose class is here, which without
    # the fused kernels are one in W, their centers and slopes, and a float64 product of two of them.
    of_batch = (12 + 24 // (1 if setup.fused(machine) else setup.ranks)) * batch * dim
    passes = setup.accumulate
    block, forward, update = _blocks(setup, machine)
    drawn = 2 if setup.staged else 1  # the next step's too
    drawing = 0 if setup.rate == 1 or setup.fused(machine) else 56 * drawn * rows  # sorted, several copies
    if setup.reduction == "cosines":
        met = int(setup.batch_rate * batch)
        kept = passes * (setup.operand(machine) + 4) * rows * dim // 2 + passes * 4 * met * rows
        forward += 4 * rows * dim + 2 * 4 * met * rows
    else:
        kept = setup.kept_passes(machine) * setup.probability_bytes(machine)
    staged = 2 * rows * setup.row_bytes if setup.staged else 0
    if setup.staged and passes > 1:  # their rows once more, together
        staged += int(setup.stepped_rows) * setup.row_bytes
    if setup.storage != "device" and not setup.staged and machine.gpu:
        staged = 2 * block // setup.center_bytes * setup.row_bytes  # blocks of rows pass through
    freed = 0.0
    if not machine.gpu:
        widest = rows * setup.center_bytes  # of the tensors of a staged copy
        again = sum(size for size, one in ((staged, widest), (kept, kept / passes)) if one < _SMALL)
        freed = max(0.0, max(_FREED, _FREED_ROWS * 4 * dim) - again)
    return Head(
        centers=setup.shard * setup.center_bytes,
        state=setup.shard * state,
        sampled=staged,
        index=passes * rows * (4 + (8 if setup.rate < 1 else 0) + (16 if setup.staged else 0)),
        kept=kept,
        forward=int(max(forward + of_batch, drawing, freed)),
        update=update + of_batch // 3,
    )


def _blocks(setup: Setup, machine: Machine) -> tuple[int, int, int]:
    """Bytes of a block of rows, and what the blocks of the forward pass and of the row update take."""
    batch, dim, wide = setup.global_batch, setup.dim, 1 + sum(width > 1 for width in setup.state.values())
    item, all_kept = setup.operand(machine), setup.kept_passes(machine) == setup.accumulate
    if setup.fused(machine):
        rows = min(setup.rows, max(1024, _FUSED_NUMBERS // max(batch, dim)))
        stepped = min(setup.rows, max(1024, _UPDATE_NUMBERS // dim))
        p = 0 if all_kept else item * batch
        # A block is made before the one before it is given back.
        forward = (1 + (rows < setup.rows)) * rows * (item * dim + p) + setup.rows * batch * 4 / _TILE
        update = stepped * ((1 + (stepped < setup.rows)) * 4 * dim + (p and p + item * dim))
        return int(rows * setup.center_bytes), int(forward), int(update)
    block = (_GPU_BLOCK if machine.gpu else _CPU_BLOCK * machine.threads) // (4 * dim) * dim * 4
    of_batch = 0 if all_kept else block // dim * batch
    block = min(block, int(setup.rows) * 4 * dim)
    # On a GPU torch's own operations step a block: it and its state gathered, as they were, as they become, rounded.
    copies = 3 * wide + (7 if setup.center_dtype == "bf16" else 3)
    return block, 3 * block + of_batch, (copies if machine.gpu else 2) * block + of_batch


def _pinned(size: int) -> int:
    """What two buffers of together ``size`` bytes take in pinned memory, where torch rounds up to a power of two."""
    return 2 << max(0, size // 2 - 1).bit_length() if size else 0


def plan_memory(setup: Setup, machine: Machine, backbone: BackboneCost, *, copied: bool = False) -> Memory:
    """Of a rank that trains.

    Args:
        copied: whether checkpoints are copied into host memory before they are written.
    """
    head = head_memory(setup, machine)
    kept_activations = backbone.activations + max(head.forward, head.update if machine.gpu else 0)
    buffers = max(kept_activations, backbone.peak, head.update) - backbone.activations
    rows = head.centers, head.state
    where = {"device": "device", "host": "host", "file": "disk"}[setup.storage]
    of_network = 2 * backbone.parameters + backbone.other + backbone.average + backbone.state
    saved = sum(rows) + backbone.parameters + backbone.average + backbone.state if copied else 0
    parts = [
        Part("centers", **{where: rows[0]}),
        Part("row state", **{where: rows[1]}),
        Part("sampled rows", head.sampled + head.index, _pinned(head.sampled) if machine.gpu else 0),
        Part("kept probabilities" if setup.reduction == "blocks" else "cosines and rows", head.kept),
        Part("backbone, gradients, optimizer", of_network),
        Part("activations", backbone.activations),
        Part("images", _PREFETCHED * backbone.images),
        Part("buffers", buffers),
        Part("copy for checkpoints", host=saved),
        Part("process", _CONTEXT if machine.gpu else 0, _PROCESS if machine.gpu else _CPU_PROCESS),
    ]
    if not machine.gpu:
        parts.append(Part("freed, not given back", _NOT_GIVEN_BACK * backbone.activations))
        parts = [Part(part.name, 0, part.device + part.host, part.disk) for part in parts]
    return Memory(tuple(part for part in parts if part.device or part.host or part.disk))
