"""Arrays kept in a cache file and mapped into memory, so that the processes of a machine share them.

``cached_arrays`` returns the arrays of the file, or computes and stores them where there is no valid file. A lock file
next to it lets one process compute while the others wait (``_turn``). It is only advisory: a process that shows no sign
of life for ``PATIENCE`` seconds is not waited for any longer, and without file locks the work is merely done several
times. A valid file is never replaced: a host that has mapped a file of a network file system loses the pages when
another host replaces it, and the next access ends the process (SIGBUS). So the arrays are written under a temporary
name, and renamed only if there still is no valid file.

The file holds arrays in numpy's .npy format, each padded to a multiple of 64 bytes, then a CRC32 of all that. The first
array is JSON text: what the others were computed from, with sizes and modification times of the source files. It is
mapped by ``MappedFile`` since ``numpy.load(mmap_mode="r")`` keeps a descriptor open for each file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np

from ..atomic import unfinished_name
from .mapped import MappedFile

PATIENCE = 300.0
"""Seconds to wait for another process that computes the arrays, since its last sign of life."""
_POLL = 0.05  # seconds
_SETTLED = 2.0  # seconds after which a file that changes again also gets another modification time
_ALIGN = 64  # bytes, as numpy aligns an array in its own file
_HEADER = 1024  # bytes: more than the .npy header of a one-dimensional array has
_CRC = 4  # bytes


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
    """The arrays of the cache file ``path``, see ``load_arrays``; if there is none, what ``make`` returns.

    They are stored, unless one of ``files``, from which they are computed, has just changed.
    """
    arrays = load_arrays(path, about)
    if arrays is None and settled(files):
        with _turn(path):
            arrays = load_arrays(path, about)  # another process may have stored them
            if arrays is None:
                arrays = make()
                if settled(files):
                    arrays = store_arrays(path, about, arrays) or arrays
    return make() if arrays is None else arrays


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Waits for a process that is computing the cache of ``path``, until it has not touched the lock for ``PATIENCE``.

    The first process holds the lock. Those that waited for it then run at the same time: if it could not store its
    arrays, they could not store theirs either, and would only wait for each other. Without file locks all run at once.
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
        with suppress(OSError):  # already removed, or replaced by another process's
            if not given_up and os.path.samestat(place.stat(), os.fstat(descriptor)):
                place.unlink()
        os.close(descriptor)


def _show_life(lock: Path, done: Event) -> None:
    while not done.wait(PATIENCE / 10):
        with suppress(OSError):
            os.utime(lock)


def _first_lock(path: Path) -> tuple[Path, int] | None:
    """The lock file next to the first path where the cache can be stored, and its open descriptor."""
    for place in _places(path):
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = place.with_name(f".{place.name}.lock")
            return lock, os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    return None


def load_arrays(path: Path, about: dict[str, Any]) -> list[np.ndarray] | None:
    """The arrays that ``store_arrays`` stored for ``path``, mapped and read-only.

    None if there is no file, if its arrays were computed from something else than ``about``, or if it is damaged.
    """
    for place in _places(path):
        arrays = _load(place, about)
        if arrays is not None:
            return arrays
    return None


def store_arrays(path: Path, about: dict[str, Any], arrays: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """Store ``arrays`` at ``path``, or in the user's cache folder if that cannot be written; a valid file stays.

    Returns them mapped from the file; None if they cannot be stored anywhere.
    """
    for place in _places(path):
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            _write(place, about, arrays)
            if (kept := _load(place, about)) is not None:
                return kept
    return None


def _places(path: Path) -> list[Path]:
    """Where the cache of ``path`` can be: ``path`` itself, and a file in the user's cache folder."""
    places = [path]
    with suppress(RuntimeError):  # a user without a home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
        places.append(folder / "pfc" / f"{name}.cache")
    return places


def _write(path: Path, about: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
    unfinished = unfinished_name(path)
    try:
        with unfinished.open("wb") as file:
            for array in (_origin(about), *arrays):
                np.save(file, array)
                file.write(bytes(-file.tell() % _ALIGN))
        crc = zlib.crc32(MappedFile(unfinished).view)
        with unfinished.open("ab") as file:
            file.write(crc.to_bytes(_CRC, "little"))
        if _load(path, about) is None:
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _load(path: Path, about: dict[str, Any]) -> list[np.ndarray] | None:
    try:
        mapped = MappedFile(path).view
    except (OSError, ValueError):  # missing or empty
        return None
    content = mapped[:-_CRC]
    if zlib.crc32(content) != int.from_bytes(mapped[-_CRC:], "little"):
        return None
    arrays: list[np.ndarray] = []
    at = 0
    while at < len(content):
        header = io.BytesIO(content[at : at + _HEADER])
        np.lib.format.read_magic(header)
        shape, _, dtype = np.lib.format.read_array_header_1_0(header)
        at += header.tell()
        arrays.append(np.ndarray(shape, dtype, content, at))
        at += arrays[-1].nbytes
        at += -at % _ALIGN
    return arrays[1:] if arrays and np.array_equal(arrays[0], _origin(about)) else None


def _origin(about: dict[str, Any]) -> np.ndarray:
    """``about`` as the first array of the file, uint8."""
    return np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
