"""Centers and their optimizer's state in host memory, or in a file, for heads whose device they do not fit.

A center and the state as wide as itself stand side by side (one page at D = 512 with momentum). A step works on a copy
of its own rows, on the head's device:

* the next step's negatives, which follow from seed and step alone, are read while this step runs; its batch's own
  classes are read when the batch is there; a row that this step has changed and the next one uses too is copied over
  from one step's rows to the other's;
* changed rows are written back while the next step runs.

One thread does all of this in order, so a row is never read before it is written back, except where it is copied over.
Both steps' rows stand in buffers that change places and grow only where a step needs more rows than any before.
"""

import math
import mmap
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkstemp
from typing import Any, Literal

import torch
from torch import Tensor

from . import device as devices
from .kernels import native

Storage = Literal["device", "host", "file"]
PLACES: tuple[Storage, ...] = ("device", "host", "file")
_LINE = 64  # bytes of a cache line, which no row shares with another
CENTERS = "centers"


class RowStore:
    """A rank's rows, in host memory or in a file that is mapped into it.

    The file has no name once it is there: it ends with the process, whatever ends that. Nothing is ever read from it by
    another: a run goes on from its last checkpoint.

    Args:
        rows: N.
        dim: D, of the centers.
        dtype: of the centers, and of state that is as wide.
        state: name → numbers of state a row, or their shape. One number a row (a count, a sum) is float32, or float64
            beside float64, and stands apart.
        directory: where the file is to be; None for host memory.

    Attributes:
        parts: "centers" [N, D], then each state [N, …]; zeros at first.

    Raises:
        OSError: the disk refused the file; the message names it.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        dtype: torch.dtype,
        state: Mapping[str, int | Sequence[int]],
        directory: str | os.PathLike[str] | None,
    ) -> None:
        shapes = {CENTERS: (dim,)} | {
            name: (numbers,) if isinstance(numbers, int) else tuple(numbers) for name, numbers in state.items()
        }
        widths = {name: math.prod(shape) for name, shape in shapes.items()}
        together = [name for name, width in widths.items() if width > 1 or name == CENTERS]
        columns = [name for name in widths if name not in together]
        record = aligned(sum(widths[name] for name in together) * dtype.itemsize)
        number = torch.promote_types(dtype, torch.float32)
        column = aligned(rows * number.itemsize)
        self._map: mmap.mmap | None = None
        records, *rest = self._memory(rows * record + len(columns) * column, directory).split(
            [rows * record, *[column] * len(columns)]
        )
        self._records = records = records.view(rows, record)
        self.parts: dict[str, Tensor] = dict.fromkeys(shapes, records)  # in their order
        offset = 0
        for name in together:
            size = widths[name] * dtype.itemsize
            self.parts[name] = records[:, offset : offset + size].view(dtype).unflatten(1, shapes[name])
            offset += size
        for name, memory in zip(columns, rest, strict=True):
            self.parts[name] = memory[: rows * number.itemsize].view(number).view(rows, *shapes[name])

    @property
    def centers(self) -> Tensor:
        return self.parts[CENTERS]

    def will_need(self, places: Tensor) -> None:
        """Begins to read rows, int64 [n], of a file."""
        if self._map is not None:
            native.will_need(self._records, places)

    def _memory(self, size: int, directory: str | os.PathLike[str] | None) -> Tensor:
        if directory is None:
            # Not pinned: torch would round it up to a power of two. The buffers through which rows pass are.
            return torch.zeros(size, dtype=torch.uint8, device="cpu")
        if size == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = mkstemp(prefix=".pfc-centers-", dir=folder)
        try:
            os.unlink(name)
            os.posix_fallocate(descriptor, 0, size)  # a full disk would kill the process later, at a write
            self._map = mmap.mmap(descriptor, size)
        except OSError as error:
            error.filename = f"{folder} ({size / 1e9:,.1f} GB for the centers)"
            raise
        finally:
            os.close(descriptor)
        self._map.madvise(mmap.MADV_RANDOM)  # what is read around a row is another class's
        return torch.frombuffer(self._map, dtype=torch.uint8)


_SLACK = 64  # buffers grow by this part more than they must, or would grow again, and be copied, in many steps


@dataclass(frozen=True)
class TakenRows:
    """A step's copy of its rows.

    Attributes:
        places: in the store, int64 [K] on the host, ascending, each once.
        slots: where each stands in ``parts``, int64 [K] on the host.
        index: the same on the head's device.
        parts: the centers [≥ K, D], then their state, on the head's device.
    """

    places: Tensor
    slots: Tensor
    index: Tensor
    parts: Sequence[Tensor]


class StagedRows:
    """The rows of a step, and those of the next one, on the head's device.

    Args:
        store: where all rows are.
        device: where the steps' are.
    """

    def __init__(self, store: RowStore, device: torch.device) -> None:
        self.store = store
        self.device = device
        self._now, self._next, self._union = (_Buffer(store, device) for _ in range(3))
        self.latest: TakenRows | None = None
        """What ``take`` returned last, until its rows are changed; those before it no longer have their rows."""
        self._changed: TakenRows | None = None  # by the last step, and copied over to the next one
        self._spare = 0
        self._process = os.getpid()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pfc-rows")
        self._read: Future[Tensor] | None = None
        self._key: Hashable = None  # of what is read
        self._written: Future[None] | None = None

    @property
    def centers(self) -> Tensor:
        """Of a step's rows, [n, D]: for their dtype and device."""
        return self._now.parts[0]

    def take(self, places: Tensor, spare: int) -> TakenRows:
        """The rows of a step.

        Args:
            places: in the store, int64 [K] on the host, ascending, each once.
            spare: how many of these no call of ``fetch`` may have known, for which room is kept.
        """
        self._check_process()
        self._spare = spare
        if self._read is None:  # of what the last steps changed, nothing may be on its way
            self._finish_writing()
            self._changed = None
            self._next.forget()
        else:  # which waited for what the step before the last one changed; the last one's is copied over below
            read, self._read = self._read, None
            read.result()
        slots = self._next.complete(self.store, places, spare)
        self._now, self._next = self._next, self._now  # not before: the step may be tried again where it failed
        taken = self.latest = TakenRows(places, slots, slots.to(self.device), self._now.parts)
        if self._changed is not None:
            self._carry_over(self._changed, taken)
            self._changed = None
        return taken

    def fetch(self, key: Hashable, places: Callable[[], Tensor]) -> None:
        """Begins to read rows that the next step will take.

        Args:
            key: what they follow from.
            places: gives them, as for ``take``; called in another thread.
        """
        buffer, store, spare, begin = self._next, self.store, self._spare, self._mark()
        self._key = key
        self._read = self._thread.submit(lambda: buffer.fill(store, places(), spare, begin))

    def fetched(self, key: Hashable) -> Tensor | None:
        """The places of ``fetch`` when they have been read, if it was called with this key; else None."""
        if self._read is None or key != self._key:
            return None
        try:
            return self._read.result()
        except BaseException:
            self._read = None  # the step may be tried again
            raise

    def sum_up(self, places: Tensor) -> TakenRows:
        """The rows of several passes that make one step, or of one that another followed; arguments as of ``take``."""
        self._finish_writing()
        self._union.forget()
        slots = self._union.complete(self.store, places, 0)
        return TakenRows(places, slots, slots.to(self.device), self._union.parts)

    def write(self, taken: TakenRows) -> None:
        """Begins to write back rows that were changed where ``take`` or ``sum_up`` has put them."""
        self._finish_writing()
        buffer = self._now if taken is self.latest else self._union
        if self._changed is not None:  # a second step after one call of take: what was read ahead is no longer true
            self._drop_read()
        self._changed = taken
        self.latest = None  # what another step may do to this copy must go through sum_up
        self._written = self._thread.submit(buffer.write_back, self.store, taken, self._mark())

    def settle(self) -> None:
        """When it returns all that was changed is in the store, where it may be changed by others."""
        self._check_process()
        self._drop_read()
        self._finish_writing()
        self._changed = None

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                "centers in host memory or a file stay with the process that built the head: it has forked"
            )

    def _drop_read(self) -> None:
        """What was read ahead is not needed, nor whether that failed."""
        read, self._read = self._read, None
        if read is not None:
            read.exception()

    def _mark(self) -> Any:
        """The event that what was queued so far is done; a CPU has none."""
        return devices.streams(self.device).current_stream(self.device).record_event()

    def _finish_writing(self) -> None:
        if self._written is not None:
            self._written.result()
            self._written = None

    def _carry_over(self, changed: TakenRows, taken: TakenRows) -> None:
        if not len(changed.places):
            return
        where = torch.searchsorted(changed.places, taken.places).clamp_max(len(changed.places) - 1)
        both = changed.places[where] == taken.places
        to, source = taken.slots[both].to(self.device), changed.slots[where[both]].to(self.device)
        for new, old in zip(taken.parts, changed.parts, strict=True):
            native.copy_rows(new, to, old, source)


class _Buffer:
    """The rows of one step: first those that were read before it began, then those that it alone knows.

    Attributes:
        parts: on the head's device; the same list for as long as there is room in it.
    """

    def __init__(self, store: RowStore, device: torch.device) -> None:
        self.device = device
        # Places of the rows that were read before, ascending; how many rows there are in all.
        self._read, self._used = torch.empty(0, dtype=torch.int64, device="cpu"), 0
        with devices.selected(device):
            self._stream = devices.streams(device).Stream()
        self.parts = [part.new_empty(0, *part.shape[1:], device=device) for part in store.parts.values()]
        self._host = devices.host_side(self.parts)

    def forget(self) -> None:
        self._read, self._used = self._read[:0], 0

    def fill(self, store: RowStore, places: Tensor, spare: int, begin: Any) -> Tensor:
        """Reads rows, int64 [n], and returns their places; nothing uses those that stood here before from the event
        ``begin`` on."""
        store.will_need(places)
        self.forget()
        self._reserve(len(places) + spare)
        self._gather(store, places)
        self._copy(self.parts, self._host, begin)
        self._read = places
        return places

    def complete(self, store: RowStore, places: Tensor, spare: int) -> Tensor:
        """Reads those of the rows that are missing; where all are: int64 [K], on the host."""
        slots = torch.searchsorted(self._read, places)
        there = torch.zeros_like(places, dtype=torch.bool)
        if len(self._read):
            there = self._read[slots.clamp_max(len(self._read) - 1)] == places
        missing, first = places[~there], self._used
        slots[~there] = torch.arange(first, first + len(missing), device="cpu")
        store.will_need(missing)
        self._reserve(first + max(spare, len(missing)))
        self._gather(store, missing)
        for part, rows in zip(self.parts, self._host, strict=True):
            if part is not rows:
                part[first : self._used].copy_(rows[first : self._used])
        return slots

    def write_back(self, store: RowStore, taken: TakenRows, changed: Any) -> None:
        """Writes rows into the store, which are as they shall be from the event ``changed`` on."""
        self._copy(self._host, self.parts, changed)
        for to, rows in zip(store.parts.values(), self._host, strict=True):
            native.copy_rows(to, taken.places, rows, taken.slots)

    def _gather(self, store: RowStore, places: Tensor) -> None:
        first, self._used = self._used, self._used + len(places)
        for rows, part in zip(self._host, store.parts.values(), strict=True):
            native.copy_rows(rows[first:], None, part, places)

    def _copy(self, to: list[Tensor], source: list[Tensor], begin: Any) -> None:
        """Between device and host, when ``begin`` has come; done when it returns. Nothing where both are one."""
        if to is source:
            return
        with devices.streams(self.device).stream(self._stream):
            self._stream.wait_event(begin)
            for new, old in zip(to, source, strict=True):
                new[: self._used].copy_(old[: self._used], non_blocking=True)
            done = self._stream.record_event()
        if done is not None:
            done.synchronize()

    def _reserve(self, rows: int) -> None:
        """Room for so many rows; those that are there stay."""
        if rows <= len(self.parts[0]):
            return
        rows += rows // _SLACK  # how many of a block's classes are this shard's differs from step to step
        old_parts, old_host = self.parts, self._host
        self.parts = [part.new_empty(rows, *part.shape[1:]) for part in old_parts]
        self._host = devices.host_side(self.parts)
        for new, old in [*zip(self.parts, old_parts, strict=True), *zip(self._host, old_host, strict=True)]:
            new[: self._used].copy_(old[: self._used])
        # The new memory may be one that other streams' work still reads, and so may the old one be for its next owner.
        devices.streams(self.device).synchronize()


def aligned(size: int) -> int:
    """Bytes that a row of ``size`` bytes takes in a store."""
    return -(-size // _LINE) * _LINE
