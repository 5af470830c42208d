"""Reads remote files through fsspec, whole or in parts; again where an answer fails, is short, or does not come."""

from __future__ import annotations

import hashlib
import math
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..atomic import make_folder
from ..errors import UsageError

_INSTALL = "pip install 'pfc[remote]'"
PIECE = 1 << 24  # bytes that are read at a time
_COPIES = 4  # files that are copied at a time
_IN_TIME = 1 << 22  # bytes for which an answer may take ``timeout`` seconds longer
_FIRST_WAIT = 0.5  # seconds before the second attempt; doubled before every further one
_LONGEST_WAIT = 15.0
_TAGS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "Last-Modified", "updated", "mtime")
_MISSING = (404, 410)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """How long to wait for a remote answer: seconds for each attempt, and attempts."""

    timeout: float = 60.0
    attempts: int = 5


class RemoteError(UsageError):
    """A remote file that cannot be read, or is not there."""


class MissingError(RemoteError):
    """A remote file that is not there."""


class RefusedError(RemoteError):
    """A remote file that may not be read."""


class _ShortAnswer(OSError):
    """An answer with fewer bytes than were asked for, or more."""


class Store:
    """The files under ``url``, a folder or bucket; thread-safe.

    Raises:
        UsageError: fsspec, or what it needs for this kind of address, is not installed.
    """

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        self.url = url.rstrip("/")
        self._patience = patience or Patience()
        self._connect()

    def _connect(self) -> None:
        """Anew in a process that was forked: connections are not shared."""
        url, scheme = self.url, self.url.partition("://")[0]
        self._process = os.getpid()
        try:
            from fsspec.asyn import AsyncFileSystem
            from fsspec.core import url_to_fs
        except ImportError:
            raise UsageError(f"{url}: reading remote files needs fsspec: {_INSTALL}") from None
        try:
            self._files, self._root = url_to_fs(self.url, **_idle_limits(scheme, self._patience.timeout))
        except ImportError as error:
            raise UsageError(f"{url}: {scheme}:// needs another package ({error}): {_INSTALL}") from None
        except (ValueError, TypeError) as error:
            raise UsageError(f"{url}: {' '.join(str(error).split())}: check the address") from None
        self._can_limit = isinstance(self._files, AsyncFileSystem)

    def _limit(self, size: int = 0) -> dict[str, float]:
        """The longest that an answer of ``size`` bytes may take, for the systems that can be told."""
        return {"timeout": self._patience.timeout * (1 + math.ceil(size / _IN_TIME))} if self._can_limit else {}

    @property
    def longest(self) -> float:
        """Seconds after which an answer of a piece has come or failed for good."""
        return self._patience.attempts * self._patience.timeout

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of a file; all without ``stop``. RemoteError where they cannot be had."""

        def whole() -> bytes:
            return self._files.cat_file(self._path(name), **self._limit(_IN_TIME))

        def part() -> bytes:
            found = self._files.cat_file(self._path(name), start=start, end=stop, **self._limit((stop or 0) - start))
            if len(found) != (wanted := (stop or 0) - start):
                more = "; does this server answer requests for parts of a file?" if len(found) > wanted else ""
                raise _ShortAnswer(f"{len(found):,} bytes came, {wanted:,} were asked for{more}")
            return found

        return self._try(name, whole if stop is None else part)

    def stat(self, name: str) -> tuple[int, str]:
        """Bytes of a file, and what changes when its content does. RemoteError where it is not there."""
        about: dict[str, Any] = self._try(name, lambda: self._files.info(self._path(name), **self._limit()))
        if about.get("type") == "directory":
            raise RemoteError(f"{self.url}/{name} is a folder")
        if about.get("size") is None:
            raise RemoteError(f"{self.url}/{name}: the server does not say its size: copy the data set to a disk")
        return int(about["size"]), next((f"{key}={about[key]}" for key in _TAGS if about.get(key)), "")

    def has(self, name: str) -> bool:
        """Whether the file is there. RemoteError where that cannot be found out."""
        return self._try(name, lambda: self._exists(name))

    def names(self) -> list[str]:
        """The names of the files in the folder, sorted. RemoteError where they are not listed."""
        self._files.invalidate_cache()
        found = self._try("", lambda: self._files.ls(self._root, detail=True, **self._limit()))
        return sorted(one["name"].rstrip("/").rpartition("/")[2] for one in found if one["type"] == "file")

    def walk(self) -> list[tuple[str, int]]:
        """All files at any depth, relative to the folder, with their bytes; sorted."""
        self._files.invalidate_cache()
        found: dict[str, Any] = self._try("", lambda: self._files.find(self._root, detail=True, **self._limit()))
        root = self._root.rstrip("/") + "/"
        return sorted((path.removeprefix(root), int(about.get("size") or 0)) for path, about in found.items())

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def _exists(self, name: str) -> bool:
        try:
            self._files.info(self._path(name), **self._limit())
        except OSError as error:
            if _is_missing(error):
                return False
            raise
        return True

    def _try(self, name: str, ask: Callable[[], Result]) -> Result:
        if os.getpid() != self._process:
            self._connect()
        wait = _FIRST_WAIT
        what = f"{self.url}/{name}".rstrip("/")
        for attempt in range(self._patience.attempts):
            if attempt:
                time.sleep(wait * random.uniform(0.5, 1.0))  # so that many ranks do not ask in step
                wait = min(2 * wait, _LONGEST_WAIT)
            try:
                return ask()
            except Exception as error:
                if _is_missing(error):
                    raise MissingError(f"{what}: no such file or folder; check the address") from None
                if _is_refused(error):
                    raise RefusedError(f"{what}: {_reason(error)}; check the credentials and the rights") from None
                failure = error
        raise RemoteError(
            f"{what} cannot be read, in {self._patience.attempts} attempts: {_reason(failure)}; "
            "check the network and the address, then give the command again"
        ) from None


def _idle_limits(scheme: str, seconds: float) -> dict[str, Any]:
    """The options by which an answer of which nothing more comes for so long has failed."""
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)}}
    if scheme in ("s3", "s3a"):
        return {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds}}
    return {}


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, where there is one."""
    seen: BaseException | None = error
    while seen is not None:
        told = getattr(seen, "response", None)  # of botocore
        if isinstance(told, dict) and "ResponseMetadata" in told:
            return told["ResponseMetadata"].get("HTTPStatusCode")
        for name in ("status", "code"):
            if isinstance(number := getattr(seen, name, None), int):
                return number
        seen = seen.__cause__
    return None


def _is_missing(error: BaseException) -> bool:
    # Over HTTP fsspec calls any failure to find out a size a missing file: its cause says what it was.
    if isinstance(error, FileNotFoundError):
        return error.__cause__ is None or _status(error.__cause__) in _MISSING
    return _status(error) in _MISSING


def _is_refused(error: BaseException) -> bool:
    named = type(error).__name__ == "NoCredentialsError"
    return named or isinstance(error, PermissionError) or _status(error) in (401, 403)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        error = error.__cause__ or error
    if isinstance(error, TimeoutError) or type(error).__name__ == "FSTimeoutError":
        return "no answer in time"
    return " ".join(str(error).split()) or type(error).__name__


def copy_files(addresses: list[str], folder: Path, patience: Patience | None = None) -> list[Path]:
    """Copies of the files at ``addresses`` in ``folder``, in that order; an interrupted call goes on where it was.

    RemoteError where one cannot be read.
    """
    if not addresses:
        return []
    make_folder(folder)
    over = threading.Event()
    with ThreadPoolExecutor(_COPIES) as pool:
        try:
            return list(pool.map(lambda address: _copy(address, folder, patience, over), addresses))
        finally:
            over.set()  # after Ctrl-C, or where one could not be read: the others end at their next piece


def _copy(address: str, folder: Path, patience: Patience | None, over: threading.Event) -> Path:
    url, _, name = address.rpartition("/")
    store = Store(url, patience)
    size, tag = store.stat(name)
    version = hashlib.sha256(f"{address}\0{size}\0{tag}".encode()).hexdigest()[:16]
    place, begun = folder / version / name, folder / f"{version}.partial"
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        with begun.open("ab") as file:
            while (start := file.tell()) < size:
                if over.is_set():
                    raise InterruptedError
                file.write(store.read(name, start, min(start + PIECE, size)))
        begun.replace(place)
    return place
