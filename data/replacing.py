"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to: that file takes ``path``'s place when the block ends well, else it goes."""
    unfinished = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_folder(new: Path, place: Path, *, at_last: Callable[[], None] = lambda: None) -> None:
    """Rename ``new``, a complete folder beside ``place``, to ``place``; a folder that is there goes when it has.

    The old one is renamed first: at every moment one of the two is whole, here or at ``replaced_of(place)``, and after
    a kill in between ``restore_replaced`` brings it back. ``at_last`` is called when ``place`` is free. OSError where
    that is impossible: then the old one is there as before.
    """
    _sync_all(new)
    old = replaced_of(place)
    had_one = place.exists()
    if had_one:
        os.rename(place, old)
    try:
        at_last()
        os.replace(new, place)
    except OSError:
        if had_one:
            os.rename(old, place)
        raise
    _sync(place.parent)
    if had_one:
        shutil.rmtree(old, ignore_errors=True)


def replaced_of(place: Path) -> Path:
    """Where ``replace_folder`` keeps the old folder of ``place`` until the new one is there."""
    return place.with_name(f".{place.name}.replaced")


def restore_replaced(place: Path) -> None:
    """Bring the old folder of ``place`` back where ``replace_folder`` was interrupted before the new one was there.

    Where something is at ``place``, that is the new one, and the old one goes.
    """
    old = replaced_of(place)
    if not old.exists():
        return
    try:
        os.rename(old, place)  # also where that is an empty folder
    except OSError:
        if not place.exists():
            raise
        shutil.rmtree(old, ignore_errors=True)


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():  # some disks have nothing to sync of a folder
            os.fsync(handle)
    finally:
        os.close(handle)
