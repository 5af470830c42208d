"""Folders of images in an object store or on a web server that lists them."""

from __future__ import annotations

import errno
import os
from array import array
from functools import lru_cache
from typing import Any

import numpy as np

from ...alignment import Landmarks
from ...errors import UsageError
from ...images import SUFFIXES
from ...records.manifest import printable
from ...remote.store import MissingError, RemoteError, Store
from ..storing import Storing
from .base import FileSource, Reader, Texts
from .folder import refuse_empty


class BucketSource(FileSource):
    """The images under ``address``, as ``FolderSource`` takes those of a folder, in the same order."""

    def __init__(self, address: str, *, allow_empty: bool = False) -> None:
        self.address = address.rstrip("/")
        self.paths = Texts()
        self.about = printable(f"folder {self.address}")
        files: dict[str, list[str]] = {}
        for path, _ in Store(self.address).walk():
            folder, slash, _ = path.partition("/")
            if any(part.startswith(".") for part in path.split("/")) or path.endswith("/"):
                continue
            if slash:
                files.setdefault(folder, []).append(path)
            else:
                self.ignored_files += 1
        if not files:
            raise UsageError(
                f"{self.address} has no sub-folders: put the images of each identity into a sub-folder of its own"
            )
        self.names = sorted(files)
        codes, without = array("i"), []
        for code, name in enumerate(self.names):
            images = [path for path in files[name] if os.path.splitext(path)[1].lower() in SUFFIXES]
            self.ignored_files += len(files[name]) - len(images)
            for path in sorted(images, key=_files_first):
                self.paths.append(os.fsencode(path))
                codes.append(code)
            if not images:
                without.append(name)
        self.codes = np.frombuffer(codes, dtype=np.int32) if codes else np.zeros(0, dtype=np.int32)
        refuse_empty(self.address, len(codes), without, allow_empty=allow_empty)

    def reader(self, store: Storing, identities: int, *, shuffled: bool) -> Reader:
        return BucketReader(self.address, store)


def _files_first(path: str) -> list[tuple[bool, str]]:
    """The place of a path in the order of ``FolderSource``: files of a folder come before its sub-folders."""
    *folders, name = path.split("/")
    return [*((True, folder) for folder in folders), (False, name)]


class BucketReader:
    """Stores one image, (path under ``address``, landmarks). OSError where it cannot be fetched."""

    def __init__(self, address: str, store: Storing) -> None:
        self.address = address
        self.store = store

    def __call__(self, task: tuple[str, Landmarks | None]) -> bytes | str:
        path, landmarks = task
        try:
            data = _opened(self.address).read(path)
        except MissingError:
            return "no such file"
        except RemoteError as error:
            raise OSError(errno.EIO, str(error)) from None
        return self.store(data, landmarks)


@lru_cache(maxsize=8)
def _opened(address: str) -> Any:
    """Once in each worker process."""
    return Store(address)
