"""Atomic writing: files and folders that are complete or do not exist."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from uuid import uuid4

from .errors import UsageError


def make_folder(path: Path) -> None:
    """Makes the folder and those above it; UsageError where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}: name another folder") from None


def unfinished_name(path: Path) -> Path:
    """A new name next to ``path``, hidden, for what will be moved there when it is complete."""
    return path.parent / f".{path.name}.{uuid4().hex[:8]}.partial"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name next to ``path``: the file replaces ``path`` if the block succeeds, otherwise it is removed."""
    unfinished = unfinished_name(path)
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_folder(new: Path, place: Path, *, overwrite: bool) -> None:
    """Rename ``new``, a complete folder of the same disk, to ``place``, where nothing or an empty folder is.

    With ``overwrite``, a folder that is there is renamed first: at every moment one of the two is whole, here or at
    ``replaced_of(place)``, where the old one stays. After a kill in between ``restore_replaced`` brings it back.
    OSError where all that is impossible: then what was there is there as before.
    """
    old = replaced_of(place)
    had_one = overwrite and place.exists()
    if had_one:
        os.rename(place, old)
    try:
        os.replace(new, place)
    except OSError:
        if had_one:
            os.rename(old, place)
        raise
    _sync(place.parent)


def replaced_of(place: Path) -> Path:
    """Where ``replace_folder`` leaves the old folder of ``place``."""
    return place.with_name(f".{place.name}.replaced")


def restore_replaced(place: Path) -> None:
    """Bring the old folder of ``place`` back where ``replace_folder`` was interrupted before the new one was there.

    Where a data set is at ``place``, that is the new one, and the old one goes.
    """
    from .records.manifest import MANIFEST_NAME  # here: it needs pydantic, which `pfc --help` does not wait for

    old = replaced_of(place)
    if not old.exists():
        return
    try:
        os.rename(old, place)  # also where that is an empty folder
    except OSError:
        if not place.exists():
            raise
        if (place / MANIFEST_NAME).is_file():
            remove_replaced(place)


def remove_replaced(place: Path) -> None:
    """Remove the old folder of ``place``, when the new one is there.

    Under another name, so that one of which files stay (NFS keeps those that a process maps) is in nobody's way, nor
    half of one taken for a data set; the next call tries again.
    """
    old = replaced_of(place)
    with suppress(OSError):
        os.rename(old, old.with_name(f"{old.name}-{uuid4().hex[:8]}"))
    for leftover in place.parent.glob(f"{glob.escape(old.name)}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Bring all files under ``folder`` to the disk."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # some disks have nothing to sync of a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
