"""The folder that an unfinished packing keeps, so that the same command goes on where it was interrupted."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from .errors import UsageError

_STATE = "state.json"
_LOCK = "lock"
_SKIPPED = "skipped"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of network disks


class StoppedPacking(UsageError):
    """Packing stopped by something that can be mended; the same command then goes on."""


class PartialFolder:
    """``folder``, which one process has at a time.

    ``state`` is what the last ``save`` of an interrupted packing under the same ``key`` kept, else None; then the
    folder is empty. UsageError where another process has it, or where it keeps the state of another packing; also where
    it is there and cannot be looked at: then it stays as it is. Where the disk keeps no locks, a warning says so.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._finished = False
        self._key = key
        self._lock = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / _LOCK).open("a")
            self._take()
            self.state = self._load()
        except BaseException as error:
            if self._lock is not None:
                self._lock.close()
            if isinstance(error, OSError) and os.path.lexists(self.folder):
                raise UsageError(
                    f"{self.folder} cannot be taken up: {(error.strerror or '').lower()}; what it keeps of an "
                    "interrupted packing stays: give the command again when the disk answers"
                ) from None
            raise

    def _take(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{self.folder}: another process is packing into it right now: wait for it or stop it"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"{self.folder}: its disk keeps no locks ({(error.strerror or '').lower()}), so pfc cannot tell "
                "whether another process packs into it: let no second packing into it run at once",
                stacklevel=2,
            )

    def _load(self) -> dict[str, Any] | None:
        path = self.folder / _STATE
        try:
            kept = json.loads(path.read_bytes())
            key, state = kept["key"], kept["state"]
        except FileNotFoundError:
            for path in self.folder.iterdir():
                if path.name != _LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            return None
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path}, the state of an interrupted packing, is damaged: remove that folder") from None
        if key != self._key:
            raise UsageError(
                f"{self.folder} keeps an interrupted packing with other options, of another source or by another "
                "version: give its command again to go on with it, or remove that folder"
            )
        return state

    @property
    def skipped(self) -> Path:
        """A file for the images that are left out, which goes with the state."""
        return self.folder / _SKIPPED

    @property
    def temporary(self) -> Path:
        """A folder for what is not part of the result, and can be made again."""
        path = self.folder / "temporary"
        path.mkdir(exist_ok=True)
        return path

    def remove_temporary(self) -> None:
        shutil.rmtree(self.folder / "temporary", ignore_errors=True)

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
        """Remove everything that is not part of the result; from then on it cannot be gone on with."""
        self.remove_temporary()
        for name in (f"{_STATE}.new", _STATE, _SKIPPED, _LOCK):
            (self.folder / name).unlink(missing_ok=True)
        self._finished = True

    def close(self, *, keep: bool) -> None:
        """Let go of the folder: with ``keep`` and a saved state it stays, else it goes."""
        if not self._finished and not (keep and self.state is not None):
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
