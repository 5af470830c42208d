"""Whether the disk has room for the checkpoints of a run, asked before its first step."""

import os
import shutil
import tempfile
from pathlib import Path

from ...data.errors import UsageError
from .found import FOLDER


def check(run_dir: Path, size: int, keep: int, *, best: bool) -> str | None:
    """Looks at the file system of the run's directory, which is made if it is missing.

    A checkpoint is written while those before it are still there, so ``keep`` of them take ``keep + 1`` places.

    Args:
        run_dir: of the run.
        size: bytes of one checkpoint, of all ranks.
        keep: how many stay.
        best: whether the best one stays too.

    Returns:
        A warning, where one fits but not all.

    Raises:
        UsageError: not even one and its successor fit, or the directory cannot be written.
    """
    folder = run_dir / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free + _bytes_in(folder)
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder}: {error.strerror}: no checkpoint can be written there; give another run.dir"
        ) from None
    if free < 2 * size:
        raise UsageError(
            f"{folder}: a checkpoint takes {told(size)} and the next one is written beside it, but only {told(free)} "
            "are free: make room, or give a run.dir on another disk"
        )
    places = keep + 1 + best
    if free < places * size:
        return (
            f"{folder}: {told(free)} are free, and {places} checkpoints of {told(size)} (the {keep} that are kept"
            f"{', the best' if best else ''} and the one being written) take {told(places * size)}: lower "
            "checkpoint.keep, or make room"
        )
    return None


def told(size: float) -> str:
    """A number of bytes: ``2.1 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _bytes_in(folder: Path) -> int:
    """Of what is there, which will have given way to newer ones by then."""
    return sum(
        os.path.getsize(os.path.join(where, name))
        for where, _, names in os.walk(folder)
        for name in names
        if os.path.isfile(os.path.join(where, name))
    )
