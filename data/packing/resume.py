"""The folder that an unfinished packing keeps, so that the same command goes on where it was interrupted."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import UsageError
from ..records.manifest import MANIFEST_NAME

_STATE = "state.json"
_LOCK = "lock"
_TRIES = 100  # to take the lock while other processes are just done with it
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of network disks


class StoppedPacking(UsageError):
    """Packing stopped by something that can be fixed; the same command then continues."""


class PartialFolder:
    """``folder``, which one process has at a time.

    ``state`` is what the last ``save`` of an interrupted packing under the same ``key`` kept, else None; then the
    folder is empty. ``dataset`` is the folder in it of the result, which moves to its place when it is complete.
    UsageError where another process has it, or where it keeps the state of another packing; also where it is there and
    cannot be looked at: then it stays as it is. Where the disk keeps no locks, a warning says so.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.dataset = folder / "dataset"
        self._key = key
        self._lock: IO[str] | None = None
        try:
            for _ in range(_TRIES):
                self._lock = _locked(self.folder)
                if self._lock is not None:
                    break
            else:
                raise UsageError(f"{self.folder} comes and goes: other processes pack into it: wait for them")
            self.state = self._load()
            self.dataset.mkdir(exist_ok=True)
        except BaseException as error:
            if self._lock is not None:
                self._lock.close()
            if isinstance(error, OSError) and os.path.lexists(self.folder):
                raise UsageError(
                    f"{self.folder} cannot be taken up: {(error.strerror or '').lower()}; what it keeps of an "
                    "interrupted packing stays: give the command again when the disk answers"
                ) from None
            raise

    def _load(self) -> dict[str, Any] | None:
        path = self.folder / _STATE
        key = state = None
        try:
            kept = json.loads(path.read_bytes())
            key, state = kept["key"], kept["state"]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path}, the state of an interrupted packing, is damaged: remove that folder") from None
        if key is None or not self.dataset.is_dir():  # stopped before it was saved, or when all but this was done
            if found := next(self.folder.rglob(MANIFEST_NAME), None):
                raise UsageError(
                    f"{found.parent} holds a data set and no state of its packing: move it to keep it, or remove it"
                )
            self._clear()
            return None
        if key != self._key:
            raise UsageError(
                f"{self.folder} keeps an interrupted packing with other options, of another source or by another "
                "version: give its command again to go on with it, or remove that folder"
            )
        return state

    @property
    def skipped(self) -> Path:
        """A file for the images that are left out, which goes with the state."""
        return self.folder / "skipped"

    @property
    def temporary(self) -> Path:
        """A folder for temporary files, which are not part of the result."""
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

    def close(self, *, keep: bool) -> None:
        """Let go of the folder: with ``keep`` it stays where it has a saved state or a whole data set, else it goes."""
        if not (keep and (self.state is not None or (self.dataset / MANIFEST_NAME).is_file())):
            with suppress(OSError):
                self._clear()
                (self.folder / _LOCK).unlink()  # last, since it keeps others away
                self.folder.rmdir()
        if self._lock is not None:
            self._lock.close()

    def _clear(self) -> None:
        """Remove all but the lock; first the state, without which nothing is gone on with."""
        (self.folder / _STATE).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _locked(folder: Path) -> IO[str] | None:
    """The lock file of ``folder``, taken; None where another process removed it meanwhile, or the folder.

    UsageError where another process has it.
    """
    path = folder / _LOCK
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = path.open("a")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UsageError(f"{folder}: another process is packing into it right now: wait for it or stop it") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            lock.close()
            raise
        warnings.warn(
            f"{folder}: its disk keeps no locks ({(error.strerror or '').lower()}), so pfc cannot tell "
            "whether another process packs into it: let no second packing into it run at once",
            stacklevel=2,
        )
    with suppress(FileNotFoundError):
        if os.path.samestat(path.stat(), os.fstat(lock.fileno())):  # else its holder removed it
            return lock
    lock.close()
    return None
