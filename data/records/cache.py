"""Arrays kept in a file and mapped into memory, so that the processes of a machine share them.

A cache is never missed: whoever finds none, an old one or a damaged one makes the arrays again; one process does, and
the others wait for it. A good cache is never replaced: on a network file system a host loses what it has mapped of a
file that another host replaces, and the next look at it ends the process (SIGBUS). The file is

    8 bytes b"PFCCACHE" · u32 crc32 of all that follows · u32 length of the header
    header, JSON: {"about": what the arrays were made from, "arrays": [[dtype, length], ...]}
    the arrays, each from a multiple of 64 bytes on
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

import numpy as np

from .mapped import MappedFile

_START = struct.Struct("<8sII")
_NAME = b"PFCCACHE"
_ALIGN = 64
_CRC_BLOCK = 1 << 24
_SETTLED = 2.0  # seconds after which a file that changes again also gets another modification time


PATIENCE = 300.0
"""Seconds to wait for another process that makes the arrays, from its last sign of life on."""
_POLL = 0.05  # seconds


def stamp(path: Path) -> list[int]:
    """[bytes, modification time in ns]: what changes when the file does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def settled(paths: Sequence[Path]) -> bool:
    """Whether the files were last changed so long ago that another change would show in their stamps."""
    return all(time.time() - path.stat().st_mtime > _SETTLED for path in paths)


def cached_arrays(
    path: Path, about: dict[str, Any], files: Sequence[Path], make: Callable[[], list[np.ndarray]]
) -> list[np.ndarray]:
    """The arrays that are kept for ``path``, see ``load_arrays``; where there are none, those that ``make`` gives.

    They are kept from then on, unless one of ``files``, which they are made from, has changed just now.
    """
    arrays = load_arrays(path, about)
    if arrays is None and settled(files):
        with _turn(path):
            arrays = load_arrays(path, about)  # another process may have made them
            if arrays is None:
                arrays = make()
                if settled(files):
                    arrays = store_arrays(path, about, arrays) or arrays
    return make() if arrays is None else arrays


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Waits for a process that is making the cache of ``path``, until it has not touched the lock for ``PATIENCE``.

    The first comes alone. Those that waited for it come together: where it could not keep its arrays, none would find
    another's. Where there are no locks, all come at once.
    """
    lock = _first_lock(path)
    if lock is None:
        yield
        return
    place, descriptor = lock
    waited, given_up, sign, end = False, False, None, time.monotonic() + PATIENCE
    while True:
        with suppress(OSError):  # ESTALE, where it was removed on another host
            if sign != (sign := os.fstat(descriptor).st_mtime_ns):
                end = time.monotonic() + PATIENCE
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if waited:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            break
        except OSError as error:
            given_up = time.monotonic() > end
            if given_up or error.errno not in (errno.EAGAIN, errno.EACCES):
                break
        waited = True
        time.sleep(_POLL)
    done = Event()
    if not (waited or given_up):
        Thread(target=_show_life, args=(place, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        with suppress(OSError):  # it is gone, or somebody else's by now
            if not given_up and os.path.samestat(place.stat(), os.fstat(descriptor)):
                place.unlink()
        os.close(descriptor)


def _show_life(lock: Path, done: Event) -> None:
    while not done.wait(PATIENCE / 10):
        with suppress(OSError):
            os.utime(lock)


def _first_lock(path: Path) -> tuple[Path, int] | None:
    """The lock beside the first place where the cache may be kept: its file, open."""
    for place in _places(path):
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = place.with_name(f".{place.name}.lock")
            return lock, os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    return None


def load_arrays(path: Path, about: dict[str, Any]) -> list[np.ndarray] | None:
    """The arrays that ``store_arrays`` keeps for ``path``, mapped and read-only.

    None where there are none, where they were made from something else than ``about``, or the file is not whole.
    """
    for place in _places(path):
        arrays = _load(place, about)
        if arrays is not None:
            return arrays
    return None


def store_arrays(path: Path, about: dict[str, Any], arrays: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """Keep ``arrays`` at ``path``, or in the user's cache folder where its own may not be written to; a good cache that
    is there by now stays.

    Returns them mapped from the file; None where they can be kept nowhere.
    """
    for place in _places(path):
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            _write(place, about, arrays)
            if (kept := _load(place, about)) is not None:
                return kept
    return None


def _places(path: Path) -> list[Path]:
    """``path`` itself, and its place in the user's cache folder."""
    places = [path]
    with suppress(RuntimeError):  # a user without a home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
        places.append(folder / "pfc" / f"{name}.cache")
    return places


def _write(path: Path, about: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
    header = json.dumps({"about": about, "arrays": [[array.dtype.str, len(array)] for array in arrays]}).encode()
    unfinished = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        with unfinished.open("wb") as file:
            file.write(_START.pack(_NAME, 0, len(header)))
            crc = zlib.crc32(struct.pack("<I", len(header)))
            for part in (header, *(np.ascontiguousarray(array).view(np.uint8).data for array in arrays if len(array))):
                padding = bytes(-file.tell() % _ALIGN) if part is not header else b""
                file.write(padding)
                file.write(part)
                crc = zlib.crc32(part, zlib.crc32(padding, crc))
            file.seek(0)
            file.write(_START.pack(_NAME, crc, len(header)))
        if _load(path, about) is None:
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _load(path: Path, about: dict[str, Any]) -> list[np.ndarray] | None:
    try:
        mapped = MappedFile(path).view
        name, crc, length = _START.unpack_from(mapped)
        if name != _NAME:
            return None
        header = json.loads(bytes(mapped[_START.size : _START.size + length]))
        if header["about"] != about:
            return None
    except (OSError, ValueError, KeyError, TypeError, struct.error):  # none, empty, or damaged
        return None
    found = zlib.crc32(struct.pack("<I", length))
    for start in range(_START.size, len(mapped), _CRC_BLOCK):
        found = zlib.crc32(mapped[start : start + _CRC_BLOCK], found)
    if found != crc:
        return None
    at = _START.size + length
    arrays: list[np.ndarray] = []
    for dtype, count in header["arrays"]:
        at += -at % _ALIGN if count else 0
        arrays.append(np.frombuffer(mapped, dtype=dtype, count=count, offset=at if count else 0))
        at += arrays[-1].nbytes
    return arrays
