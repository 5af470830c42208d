"""Files mapped into memory, read-only. No descriptor stays open, so a data set may have any number of shards.

Python's own ``mmap`` keeps one for each map, and Python's ``madvise`` keeps every other thread waiting meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np

from ..errors import UsageError

Given = ParamSpec("Given")
Result = TypeVar("Result")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_UNREADABLE = 0  # PROT_NONE
_FIXED = 0x10  # MAP_FIXED of Linux
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_FAILED = ctypes.c_void_p(-1).value


class MappedFile:
    """The bytes of a file, for as long as anything refers to them.

    OSError where it cannot be opened or mapped, ValueError where it is empty.

    Attributes: ``view``, the bytes; ``bytes``, the same as uint8 [size].
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if size == 0:
                raise ValueError(f"{path} is empty")
            start = _mapped(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, path)
        finally:
            os.close(descriptor)
        buffer = (ctypes.c_ubyte * size).from_address(start)
        # Not at the interpreter's end: DALI's threads may still be reading.
        weakref.finalize(buffer, _libc.munmap, start, size).atexit = False
        self._start = start
        self.view = memoryview(buffer).cast("B").toreadonly()
        self.bytes: np.ndarray = np.frombuffer(self.view, dtype=np.uint8)

    def expect_random_reads(self, yes: bool = True) -> None:
        """From now on the system reads the pages that are asked for and not their neighbours too; or, not, again."""
        _libc.madvise(self._start, len(self.view), mmap.MADV_RANDOM if yes else mmap.MADV_NORMAL)

    def will_need(self, first: int, stop: int) -> None:
        """Asks the system to read the bytes [first, stop) soon; it may leave it."""
        first = first // mmap.PAGESIZE * mmap.PAGESIZE
        _libc.madvise(self._start + first, min(stop, len(self.view)) - first, mmap.MADV_WILLNEED)


def reserve(size: int) -> tuple[int, ctypes.Array[ctypes.c_ubyte]]:
    """Addresses for ``size`` bytes: the first one, and a buffer; they are free again when nothing refers to it.

    Nothing is there before ``map_at``: whoever reads it ends the process.
    """
    start = _mapped(None, size, _UNREADABLE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE, -1)
    buffer = (ctypes.c_ubyte * size).from_address(start)
    weakref.finalize(buffer, _libc.munmap, start, size).atexit = False
    return start, buffer


def map_at(start: int, size: int, descriptor: int | None) -> None:
    """The first ``size`` bytes of an open file at an address within what ``reserve`` gave, a multiple of the page size;
    without a file, nothing again."""
    if descriptor is None:
        _mapped(start, size, _UNREADABLE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE | _FIXED, -1)
    else:
        _mapped(start, size, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, descriptor)


def _mapped(
    start: int | None, size: int, protection: int, flags: int, descriptor: int, path: Path | None = None
) -> int:
    found = _libc.mmap(start, size, protection, flags, descriptor, 0)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), None if path is None else str(path))
    return found


_OTHER_FILES = 512  # that a process may need: sources, and pipes to its workers


def make_room(files: int) -> None:
    """Lets this process open so many files for long, as far as the system lets it."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft != resource.RLIM_INFINITY and soft < files + _OTHER_FILES:
        _raise_limit()


def _raise_limit() -> int:
    """As far as the system lets this process; returns the limit up to which that is."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # where it is above the kernel's own
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def with_descriptors(work: Callable[Given, Result]) -> Callable[Given, Result]:
    """Of a function that opens files: where this process may open no more, it may open as many as the system lets it.

    UsageError where that is not enough.
    """

    @wraps(work)
    def retried(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return work(*args, **kwargs)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        hard = _raise_limit()
        try:
            return work(*args, **kwargs)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise UsageError(
                f"{error.filename} cannot be opened: all {hard} files that this process may have open are in use: "
                f"raise the limit (ulimit -n {2 * hard}, and the system's own)"
            ) from None

    return retried
