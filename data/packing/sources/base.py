"""The interface of a source of images, in a form that stays small at tens of millions of images."""

from __future__ import annotations

import errno
import hashlib
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from ...alignment import Landmarks
from ..storing import Storing


def some(names: Sequence[str]) -> str:
    """The first five of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


Reader = Callable[[Any], bytes | str]
"""Makes what is stored for an image out of its task, in a worker process; a string says why it cannot be read."""


class Source(ABC):
    """Images and their identities, listed but not yet read.

    Attributes:
        about: where they come from, for dataset.json.
        codes: int32 [N], the identity of each image as a place in ``names``; −1 for what was rejected.
        names: the name of each identity [K].
        numbers: int64 [K], the label of each identity in the source; None where it has names only.
        told: how many identities the source says it has, with or without images.
        rejected: (image, reason) that cannot be packed, found while listing.
        ignored_files: files that are no images by their names.
        whole_records: readers give whole records instead of images.
        image_size: (height, width) of all images where the source says so.
        landmarks: float32 [N, 5, 2], by which the images are aligned; None where they are not.
    """

    about: str
    codes: np.ndarray
    names: Sequence[str]
    numbers: np.ndarray | None = None
    told: int | None = None
    rejected: Sequence[tuple[str, str]] = ()
    ignored_files: int = 0
    whole_records: bool = False
    image_size: tuple[int, int] | None = None
    landmarks: Landmarks | None = None

    def prepare(self, folder: Path) -> None:  # noqa: B027 (most sources need nothing)
        """Called before reading, with a folder for temporary files that stays when packing is interrupted."""

    @abstractmethod
    def reader(self, store: Storing, identities: int, *, shuffled: bool) -> Reader:
        """What worker processes call with ``task``; must be picklable. shuffled: not in the order of the source."""

    @abstractmethod
    def task(self, image: int, label: int) -> Any:
        """What the reader needs to know of an image."""

    @abstractmethod
    def describe(self, image: int) -> str:
        """What to call an image in a message."""

    def content(self) -> Iterator[bytes]:
        """What distinguishes this source from others: the listing, not the images themselves."""
        yield self.about.encode("utf-8", "surrogateescape")
        yield self.codes.tobytes()
        for name in self.names:
            yield name.encode("utf-8", "surrogateescape") + b"\0"
        if self.landmarks is not None:
            yield self.landmarks.tobytes()

    def landmarks_of(self, image: int) -> Landmarks | None:
        """[5, 2]"""
        return None if self.landmarks is None else self.landmarks[image]


class LazyTexts(Sequence[str]):
    """Texts that are made one by one when they are asked for; a subclass has ``__len__`` and ``text``."""

    @abstractmethod
    def text(self, place: int) -> str:
        """The text at ``place``, which is at least 0 and below the length."""

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        if isinstance(place, slice):
            return [self.text(i) for i in range(*place.indices(len(self)))]
        return self.text(range(len(self))[place])


class Texts(LazyTexts):
    """Many short texts in 8 bytes each and their own; file names of any bytes included."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])

    def append(self, text: bytes) -> None:
        self._bytes += text
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def text(self, place: int) -> str:
        return os.fsdecode(bytes(self._bytes[self._ends[place] : self._ends[place + 1]]))

    def digest(self) -> bytes:
        return hashlib.sha256(self._bytes).digest() + hashlib.sha256(self._ends).digest()


class Numbers(LazyTexts):
    """The names of identities that have numbers only: int64 [K], read as texts."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def text(self, place: int) -> str:
        return str(self.numbers[place])


class FileSource(Source):
    """Images that are files: ``paths`` [N], relative to ``root``."""

    def __init__(self, root: Path, paths: Texts) -> None:
        self.root = root
        self.paths = paths

    def reader(self, store: Storing, identities: int, *, shuffled: bool) -> Reader:
        return FileReader(self.root, store)

    def task(self, image: int, label: int) -> tuple[str, Landmarks | None]:
        return self.paths[image], self.landmarks_of(image)

    def describe(self, image: int) -> str:
        return self.paths[image]

    def content(self) -> Iterator[bytes]:
        yield from super().content()
        yield self.paths.digest()


# Errors of one file, which is left out. All others are the disk's or the machine's: packing stops.
_OF_THE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR)
_OF_THE_FILE += (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)


class FileReader:
    """Stores one image file, (path under ``root``, landmarks). OSError where the disk or the machine fails."""

    def __init__(self, root: Path, store: Storing) -> None:
        self.root = root
        self.store = store

    def __call__(self, task: tuple[str, Landmarks | None]) -> bytes | str:
        path, landmarks = task
        whole = os.path.join(self.root, path)
        try:
            # Opened without waiting, so that a named pipe holds nobody up: it is read as empty.
            with open(whole, "rb", opener=_open_at_once) as file:
                data = file.read()
            return self.store(data, landmarks)
        except OSError as error:
            if error.errno in _OF_THE_FILE:
                return (error.strerror or type(error).__name__).lower()
            error.filename = whole
            raise
        except MemoryError:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), whole) from None
        except ValueError as error:  # a path with a zero byte
            return str(error)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
