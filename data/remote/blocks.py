"""The parts of remote files that are on a local disk: fetched once for all processes of a machine, bounded, checked.

A remote file is cut into blocks of 1 MiB. Each that was fetched is a file of its own, with a CRC32 at its end:

    FOLDER/blocks/KEY/GROUP/BLOCK       KEY names the remote file and its version; 16 blocks are a group

A block is complete or not there, since it is renamed when it is whole. One process at a time fetches blocks of a group:
the others wait for its lock on the group's folder, which ends with the process. Where the blocks take more than the
cache's limit, those that were not used for the longest time are removed. A process that has mapped one keeps it all the
same: a removed file lives on until nobody maps it.

``RemoteBytes`` reserves addresses for the whole file and maps blocks into their places, so that all that reads mapped
files reads remote ones, too. What was not brought cannot be read by mistake: the process would end.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path

import numpy as np

from ..atomic import replacing
from ..errors import UsageError
from ..records.mapped import map_at, reserve
from .store import Store

BLOCK = 1 << 20
GROUP = 16  # blocks that one request fetches at most
_CRC = 4  # bytes
_FETCHERS = 8  # requests of this process at a time for what is waited for; and half as many ahead of the order
_MOST_MAPPED = 4096  # blocks that this process maps at a time; fewer where they are an eighth of the limit
_LEFTOVER = 3600.0  # seconds after which a file that was not renamed is one of a process that was killed
_LOOK = 64  # the folder is looked through whenever a 64th of the limit was fetched
_LEFT = 0.9  # of the limit, when blocks were removed
_POLL = 0.02  # seconds
_TRIES = 5  # to map a block that other processes remove


class BlockCache:
    """The blocks of all remote files in one folder, ``folder``, at most ``limit`` bytes of them."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder / "blocks"
        self.limit = limit
        self._mapped: OrderedDict[tuple[RemoteBytes, int], None] = OrderedDict()
        self._stored = 0  # bytes since the folder was looked through
        self._begin_threads()
        os.register_at_fork(after_in_child=self._begin_threads)
        # concurrent.futures would fetch all that is queued before it lets the interpreter end.
        threading._register_atexit(self.forget_ahead)  # type: ignore[attr-defined]

    def _begin_threads(self) -> None:
        """Anew in a process that was forked, which has none of them."""
        self._lock = threading.RLock()
        self._depth = 0
        self._starting = threading.RLock()  # a future that is done already calls back at once
        self._flying: dict[tuple[RemoteBytes, int], tuple[frozenset[int], ThreadPoolExecutor, Future[None]]] = {}
        self._ahead = ThreadPoolExecutor(_FETCHERS // 2, "pfc-ahead")
        self._now = ThreadPoolExecutor(_FETCHERS, "pfc-fetch")

    def forget_ahead(self) -> None:
        """Fetch nothing of what was asked for ahead and is not under way."""
        with self._starting:
            old, self._ahead = self._ahead, ThreadPoolExecutor(_FETCHERS // 2, "pfc-ahead")
        old.shutdown(wait=False, cancel_futures=True)

    @property
    def _most_mapped(self) -> int:
        """A removed block takes its space until it is not mapped any more: so it is few of them."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return max(GROUP, min(_MOST_MAPPED, self.limit // (8 * ranks * BLOCK)))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within, all that was brought stays readable; one thread at a time."""
        with self._lock:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                while not self._depth and len(self._mapped) > self._most_mapped:
                    (file, block), _ = self._mapped.popitem(last=False)
                    file.unmap(block)

    def bring(self, file: RemoteBytes, blocks: Iterable[int]) -> None:
        """Make these blocks readable; only within ``reading``."""
        assert self._depth
        missing = []
        for block in blocks:
            if (file, block) in self._mapped:
                self._mapped.move_to_end((file, block))
            else:
                missing.append(block)
        for _ in range(_TRIES):
            if not missing:
                return
            self.fetch(file, missing)
            here = [block for block in missing if file.map(block)]
            self._mapped.update(dict.fromkeys((file, block) for block in here))
            missing = [block for block in missing if (file, block) not in self._mapped]
        raise UsageError(
            f"{self.folder}: blocks of {file.name} are removed before they can be read: raise "
            "data.cache.gigabytes, for all runs that share this folder"
        )

    def fetch(self, file: RemoteBytes, blocks: Iterable[int]) -> None:
        """Have these blocks on the disk; returns when they are there."""
        for fetching in [self._begin(self._now, file, group) for group in self._groups(file, blocks)]:
            fetching.result()

    def fetch_ahead(self, file: RemoteBytes, blocks: Iterable[int], *, soon: bool = False) -> None:
        """Begin to fetch these blocks; ``soon``: before all that is fetched ahead otherwise.

        What fails is tried again, and told, when the blocks are needed.
        """
        for group in self._groups(file, blocks):
            self._begin(self._now if soon else self._ahead, file, group)

    def _groups(self, file: RemoteBytes, blocks: Iterable[int]) -> list[list[int]]:
        """The blocks, sorted, group by group; without those that are here."""
        missing = [
            block for block in sorted(blocks) if (file, block) not in self._mapped and not file.place(block).exists()
        ]
        return [list(members) for _, members in groupby(missing, lambda block: block // GROUP)]

    def _begin(self, pool: ThreadPoolExecutor, file: RemoteBytes, blocks: list[int]) -> Future[None]:
        """Fetch blocks of one group, unless that is under way; what waits in another queue does not count."""
        key = (file, blocks[0] // GROUP)
        with self._starting:
            known = self._flying.get(key)
            if known is not None and known[0] >= {*blocks} and (known[1] is pool or known[2].running()):
                return known[2]
            fetching = pool.submit(self._fetch_group, file, blocks)
            self._flying[key] = frozenset(blocks), pool, fetching
        fetching.add_done_callback(lambda _: self._landed(key, fetching))
        return fetching

    def _landed(self, key: tuple[RemoteBytes, int], fetched: Future[None]) -> None:
        with self._starting:
            if key in self._flying and self._flying[key][2] is fetched:
                del self._flying[key]

    def _fetch_group(self, file: RemoteBytes, blocks: list[int]) -> None:
        folder = file.place(blocks[0]).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unwritable(folder, error) from None
        try:
            take_lock(lock, file.store.longest)
            missing = [block for block in blocks if not file.place(block).exists()]
            for first, last in _runs(missing):
                content = file.store.read(file.name, first * BLOCK, min((last + 1) * BLOCK, file.size))
                for block in range(first, last + 1):
                    at = (block - first) * BLOCK
                    self._store(file.place(block), content[at : at + BLOCK])
                self._stored += len(content)
        finally:
            os.close(lock)
        if self._stored * _LOOK > self.limit:
            self._stored = 0
            self._remove_old(int(self.limit * _LEFT))

    def _store(self, place: Path, content: bytes) -> None:
        for attempt in range(_TRIES):
            try:
                with replacing(place) as unfinished:
                    unfinished.write_bytes(content + zlib.crc32(content).to_bytes(_CRC, "little"))
                return
            except OSError as error:
                if attempt == _TRIES - 1 or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise unwritable(place.parent, error) from None
            self._remove_old(None)  # something else fills this disk

    def _remove_old(self, left: int | None) -> None:
        """Remove the blocks that were not used for the longest time until ``left`` bytes are there, if they are more
        than the limit; without a number, half of them. One process does it, and others go on."""
        lock = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            except OSError:
                pass
            found = sorted(_blocks_in(self.folder))
            total = sum(size for _, size, _ in found)
            if left is not None and total <= self.limit:
                return
            left = total // 2 if left is None else left
            for _, size, path in found:
                if total <= left:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size
        finally:
            os.close(lock)


class RemoteBytes:
    """The bytes of one remote file, at the addresses that a mapped file of its size would have.

    Attributes: ``store``, ``name``, ``size`` of the file; ``cache``; ``bytes``, uint8 [size], of which only what was
    brought may be read, and only within ``cache.reading()``.
    """

    def __init__(self, store: Store, name: str, size: int, tag: str, cache: BlockCache) -> None:
        self.store, self.name, self.size, self.cache = store, name, size, cache
        key = hashlib.sha256(f"{store.url}\0{name}\0{size}\0{tag}".encode()).hexdigest()[:32]
        self._folder = cache.folder / key
        self._start, buffer = reserve(size)
        self.view = memoryview(buffer).cast("B").toreadonly()
        self.bytes: np.ndarray = np.frombuffer(self.view, dtype=np.uint8)
        self._checked: set[int] = set()

    def place(self, block: int) -> Path:
        """The file that has this block, once it was fetched."""
        return self._folder / str(block // GROUP) / str(block)

    def map(self, block: int) -> bool:
        """Map a fetched block to its place; False where its file is gone or damaged, and then it is removed."""
        path = self.place(block)
        at = block * BLOCK
        length = min(BLOCK, self.size - at)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            whole = os.fstat(descriptor).st_size == length + _CRC
            if whole:
                map_at(self._start + at, length, descriptor)
            if whole and block not in self._checked:
                expected = int.from_bytes(os.pread(descriptor, _CRC, length), "little")
                whole = zlib.crc32(self.view[at : at + length]) == expected
            if not whole:
                self.unmap(block)
                path.unlink(missing_ok=True)
                return False
            with suppress(OSError):  # a disk that is read only by now
                os.utime(path)
        finally:
            os.close(descriptor)
        self._checked.add(block)
        return True

    def unmap(self, block: int) -> None:
        at = block * BLOCK
        map_at(self._start + at, min(BLOCK, self.size - at), None)


def take_lock(descriptor: int, seconds: float) -> None:
    """Wait for the lock of an open folder, but no longer than that: who has it may stand still. Nor where the disk has
    no locks. Without it something is fetched twice, and nothing is wrong."""
    end = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return
            time.sleep(_POLL)
        except OSError:
            return


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """The first and the last of each row of blocks without a gap."""
    starts = [block for block in blocks if block - 1 not in blocks]
    ends = [block for block in blocks if block + 1 not in blocks]
    return list(zip(starts, ends, strict=True))


def _blocks_in(folder: Path) -> Iterator[tuple[float, int, str]]:
    """(time of last use, bytes, path) of every block."""
    for path, _, names in os.walk(folder):
        for name in names:
            whole = os.path.join(path, name)
            with suppress(FileNotFoundError):
                status = os.stat(whole)
                if not name.startswith(".") or time.time() - status.st_mtime > _LEFTOVER:  # else it is being written
                    yield status.st_mtime, status.st_size, whole


def unwritable(place: Path, error: OSError) -> UsageError:
    why = (error.strerror or str(error)).lower()
    return UsageError(f"{place}: remote data cannot be kept there: {why}: choose another folder with data.cache.folder")
