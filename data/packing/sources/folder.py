"""A folder of images, one sub-folder an identity."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...errors import UsageError
from ...images import SUFFIXES
from ...records.manifest import printable
from .base import FileSource, Texts, some


class FolderSource(FileSource):
    """The images under ``src``. UsageError where it is not such a folder, or a sub-folder has no image.

    allow_empty: pass over sub-folders without an image.
    """

    def __init__(self, src: Path, *, allow_empty: bool = False) -> None:
        if not src.exists():
            raise UsageError(f"{src}: no such folder; check the path")
        if not src.is_dir():
            raise UsageError(f"{src} is a file; give the folder whose sub-folders are the identities")
        super().__init__(src, Texts())
        self.about = printable(f"folder {src.resolve()}")
        with os.scandir(src) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
        self.names = sorted(entry.name for entry in visible if _is_folder(entry))
        self.ignored_files = len(visible) - len(self.names)
        if not self.names:
            raise UsageError(f"{src} has no sub-folders: put the images of each identity into a sub-folder of its own")
        codes = array("i")
        without: list[str] = []
        for code, name in enumerate(self.names):
            before = len(codes)
            for path in _files(str(src), name, (_identity(str(src)),)):
                if os.path.splitext(path)[1].lower() in SUFFIXES:
                    self.paths.append(os.fsencode(path))
                    codes.append(code)
                else:
                    self.ignored_files += 1
            if len(codes) == before:
                without.append(name)
        self.codes = np.frombuffer(codes, dtype=np.int32) if codes else np.zeros(0, dtype=np.int32)
        refuse_empty(src, len(codes), without, allow_empty=allow_empty)


def refuse_empty(src: object, images: int, without: list[str], *, allow_empty: bool) -> None:
    """UsageError where there is no image at all, or, unless that is allowed, in the sub-folders ``without``."""
    if not images or (without and not allow_empty):
        suffixes = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise UsageError(
            f"{src}: no image in the sub-folder(s) {some(without)}: add images ({suffixes}) or remove the sub-folder(s)"
        )


def _files(root: str, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """All visible files under root/folder, relative to root, in an order that no file system decides.

    Links are followed, but not into a folder that they lie in: ``above`` are the (device, inode) of those.
    """
    place = os.path.join(root, folder)
    here = _identity(place)
    if here in above:
        return
    with os.scandir(place) as entries:
        visible = sorted(
            ((_is_folder(entry), entry.name) for entry in entries if not entry.name.startswith(".")),
        )
    for is_folder, name in visible:  # the files first
        path = f"{folder}/{name}"
        if is_folder:
            yield from _files(root, path, (*above, here))
        else:
            yield path


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one; a link to itself is not one."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False
