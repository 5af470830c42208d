"""The folder that an unfinished packing keeps, so that the same command goes on where it was interrupted."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import UsageError

_STATE = "state.json"
_LOCK = "lock"


class StoppedPacking(UsageError):
    """Packing stopped by something that can be mended; the same command then goes on."""


class PartialFolder:
    """``folder``, which one process has at a time.

    ``state`` is what the last ``save`` of an interrupted packing under the same ``key`` kept, else None; then the
    folder is empty. UsageError where another process has it, or where it keeps the state of another packing.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._finished = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._key = key
        self._lock = (self.folder / _LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UsageError(
                f"{folder}: another process is packing into it right now: wait for it or stop it"
            ) from None
        self.state = self._load()

    def _load(self) -> dict[str, Any] | None:
        try:
            kept = json.loads((self.folder / _STATE).read_bytes())
        except FileNotFoundError:
            for path in self.folder.iterdir():
                if path.name != _LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            return None
        if kept["key"] != self._key:
            self._lock.close()
            raise UsageError(
                f"{self.folder} keeps an interrupted packing with other options, of another source or by another "
                "version: give its command again to go on with it, or remove that folder"
            )
        return kept["state"]

    @property
    def temporary(self) -> Path:
        """A folder for what is not part of the result."""
        path = self.folder / "temporary"
        path.mkdir(exist_ok=True)
        return path

    def save(self, state: dict[str, Any]) -> None:
        """Keep ``state`` in place of the last one, all at once; what it speaks of must be on the disk."""
        new = self.folder / f"{_STATE}.new"
        with new.open("w", encoding="ascii") as file:
            json.dump({"key": self._key, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.folder / _STATE)
        self.state = state

    def finish(self) -> None:
        """Remove everything that is not part of the result."""
        shutil.rmtree(self.folder / "temporary", ignore_errors=True)
        for name in (f"{_STATE}.new", _STATE, _LOCK):
            (self.folder / name).unlink(missing_ok=True)
        self._finished = True

    def close(self, *, keep: bool) -> None:
        """Let go of the folder: with ``keep`` and a saved state it stays, else it goes."""
        if not self._finished and not (keep and self.state is not None):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
