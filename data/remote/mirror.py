"""The local folder that stands for a remote data set: its small files whole, its shards as far as they were read.

    FOLDER/sets/KEY/NAME/               as the data set itself; KEY names its address
        train.idx, dataset.json, …      whole, fetched again where they changed
        train.rec                       its size and nothing else
        train.rec.remote                where its bytes are

Whoever opens the folder opens the data set: ``record_file`` sees the .remote, and gives a file whose bytes come from
``blocks``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import make_folder, replacing
from ..errors import UsageError
from ..records.manifest import LABEL_NAMES_NAME, MANIFEST_NAME, read_manifest
from ..records.recordio import RecordFile
from .blocks import BLOCK, GROUP, BlockCache, RemoteBytes, take_lock, unwritable
from .store import PIECE, Patience, RefusedError, Store

_SUFFIX = ".remote"
_WHOLE = (LABEL_NAMES_NAME, "property")  # small files that a data set may have
_ASKED = 16  # files asked about at a time
_AS_A_PATH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/([^/].*)")  # what Path makes of an address: one slash


@dataclass(frozen=True)
class RemoteOptions:
    """How remote data sets are read.

    folder: where what was fetched is kept, None for pfc/remote in the user's cache folder. gigabytes: the most that
    the parts of shards take there. timeout: seconds for each answer. attempts: of reading something.
    """

    folder: str | None = None
    gigabytes: float = 100.0
    timeout: float = 60.0
    attempts: int = 5

    @property
    def place(self) -> Path:
        if self.folder is not None:
            return Path(self.folder).absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pfc" / "remote"


def address_of(path: str | Path) -> str | None:
    """The address that ``path`` is, as s3://bucket/folder; None where it is a path of this machine."""
    if isinstance(path, str) and "://" in path:
        scheme, _, rest = path.partition("://")
        return f"{scheme.lower()}://{rest}"
    found = _AS_A_PATH.fullmatch(str(path))
    if found is None or os.path.exists(path):
        return None
    scheme, rest = found.groups()
    scheme = scheme.lower()
    return f"{scheme}:///{rest}" if scheme in ("file", "local") else f"{scheme}://{rest}"


def mirrored(address: str, options: RemoteOptions | None = None) -> Path:
    """The local folder, or ``.rec``, that stands for the data set, or ``.rec``, at ``address``.

    Fetches what is not a shard. UsageError where it cannot be read, or is no data set.
    """
    options = options or RemoteOptions()
    if "?" in address:
        raise UsageError(
            f"{address}: addresses with ? (signed ones, say) name one file: give that of a folder or a .rec"
        )
    one = address.endswith(".rec")
    url, _, only = address.rpartition("/") if one else (address.rstrip("/"), "", "")
    store = Store(url, Patience(options.timeout, options.attempts))
    folder = _place(url, options)
    make_folder(folder)
    try:
        lock = os.open(folder.parent, os.O_RDONLY | os.O_CLOEXEC)  # the ranks of this machine come at the same time
        try:
            take_lock(lock, store.longest)
            recs = _renew(store, folder, only, options)
        finally:
            os.close(lock)
    except OSError as error:
        raise unwritable(folder, error) from None
    for rec in recs:  # opening a shard looks at its first and its last records
        file = RemoteRecordFile(folder / rec)
        file.fetch_soon(np.array([0, file.size - 1]), np.array([1, file.size]))
    return folder / only if one else folder


def known_mirror(address: str, options: RemoteOptions) -> Path:
    """Where the folder is that stands for the data set at ``address``, if it was opened before; asks no server."""
    url = address.rpartition("/")[0] if address.endswith(".rec") else address.rstrip("/")
    return _place(url, options) / (address.rpartition("/")[2] if address.endswith(".rec") else "")


def _place(url: str, options: RemoteOptions) -> Path:
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    return options.place / "sets" / key / (url.rpartition("/")[2] or "data")


def _renew(store: Store, folder: Path, only: str, options: RemoteOptions) -> list[str]:
    """Bring the small files, and what is to be known of the shards, up to date; gives the shards."""
    sums: dict[str, str] = {}
    if store.has(MANIFEST_NAME):
        _fetch(store, MANIFEST_NAME, folder)
        manifest = read_manifest(folder)
        assert manifest is not None
        shards = {shard.rec: shard.idx for shard in manifest.shards}
        sums = {shard.rec: shard.sha256 for shard in manifest.shards}
        others = [name for name in _WHOLE if _has(store, name)]
    elif only:
        shards, others = {}, [name for name in _WHOLE if _has(store, name)]
    else:
        names = store.names()
        recs = [name for name in names if name.endswith(".rec") and not name.startswith(".")]
        shards = {name: name.removesuffix(".rec") + ".idx" for name in recs}
        others = [name for name in _WHOLE if name in names]
    if only:
        shards = {rec: idx for rec, idx in shards.items() if rec == only} or {only: only.removesuffix(".rec") + ".idx"}
    if not shards:
        raise UsageError(f"{store.url} holds no .rec file: give the folder that holds the shards")
    for name in {*_WHOLE, *([] if sums else [MANIFEST_NAME])}.difference(others):  # of what was there before
        (folder / name).unlink(missing_ok=True)
    for rec in folder.glob("*.rec"):
        if rec.name not in shards and not only:  # of a set that was there before
            rec.unlink()
            _sidecar(rec).unlink(missing_ok=True)
    with ThreadPoolExecutor(_ASKED) as pool:
        for done in [
            *(pool.submit(_describe, store, rec, folder, sums.get(rec, ""), options) for rec in shards),
            *(pool.submit(_fetch, store, name, folder) for name in [*shards.values(), *others]),
        ]:
            done.result()
    return list(shards)


def _has(store: Store, name: str) -> bool:
    """Whether a file that need not be there is. Stores that list nothing refuse what they do not have."""
    try:
        return store.has(name)
    except RefusedError:
        return False


def _describe(store: Store, rec: str, folder: Path, checksum: str, options: RemoteOptions) -> None:
    """Make the .rec, as large as the remote one and empty, and its .remote; they stay where they are right."""
    size, tag = store.stat(rec)
    if not (tag or checksum):
        raise UsageError(
            f"{store.url}/{rec}: the server tells neither its ETag nor when it was changed, and there is no "
            "dataset.json, so what is kept of it could be old: copy the data set to a disk"
        )
    tag = f"{tag} {checksum}"
    about = {"url": store.url, "name": rec, "size": size, "tag": tag}
    path = folder / rec
    known = _read(_sidecar(path))
    if not path.exists() or any(known.get(name) != value for name, value in about.items()):
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            file.truncate(size)
    given = about | {"options": asdict(options)}
    if known != given:
        with replacing(_sidecar(path)) as unfinished:
            unfinished.write_text(json.dumps(given), encoding="utf-8")


def _fetch(store: Store, name: str, folder: Path) -> None:
    """A file as a whole, unless it is there as it is now."""
    size, tag = store.stat(name)
    path, about = folder / name, {"size": size, "tag": tag}
    mark = folder / f".{name}{_SUFFIX}"
    if tag and path.exists() and path.stat().st_size == size and _read(mark) == about:
        return
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        for start in range(0, size, PIECE):
            file.write(store.read(name, start, min(start + PIECE, size)))
    mark.write_text(json.dumps(about), encoding="utf-8")


def _sidecar(rec: Path) -> Path:
    return rec.with_name(rec.name + _SUFFIX)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def record_file(path: Path) -> RecordFile:
    """The ``.rec`` file at ``path``, be it here or only its place in a mirror."""
    return RemoteRecordFile(path) if _sidecar(path).exists() else RecordFile(path)


_caches: dict[Path, BlockCache] = {}


def _cache_of(options: RemoteOptions) -> BlockCache:
    """This process's cache at that place; with the limit that was given last."""
    place, limit = options.place, int(options.gigabytes * 1e9)
    if place not in _caches:
        _caches[place] = BlockCache(place, limit)
    _caches[place].limit = limit
    return _caches[place]


class RemoteRecordFile(RecordFile):
    """A ``.rec`` file of which this machine has those parts that were read. Each record that is read is copied."""

    is_remote = True

    def _open(self) -> RemoteBytes:
        about = _read(_sidecar(self.path))
        try:
            options = RemoteOptions(**about["options"])
            if about["size"] == 0:
                raise ValueError
            self._store = Store(about["url"], Patience(options.timeout, options.attempts))
            return RemoteBytes(self._store, about["name"], about["size"], about["tag"], _cache_of(options))
        except (KeyError, TypeError):
            raise UsageError(f"{_sidecar(self.path)} is damaged: remove {self.path.parent}") from None

    @property
    def cache(self) -> BlockCache:
        return self._mapped.cache

    def reading(self) -> AbstractContextManager[Any]:
        return self.cache.reading()

    def bring(self, first: np.ndarray | int, stop: np.ndarray | int) -> None:
        self.cache.bring(self._mapped, self._blocks(first, stop))

    def fetch_soon(self, first: np.ndarray, stop: np.ndarray) -> None:
        """Begin to fetch the bytes [first, stop) of these stretches, int64 [n], before all that is fetched ahead."""
        self.cache.fetch_ahead(self._mapped, self._blocks(first, stop), soon=True)

    def will_need(self, first: np.ndarray | int, stop: np.ndarray | int, *, share: bool = True) -> None:
        """Begin to fetch the bytes [first, stop) of one stretch or several.

        share: only this rank's part of them, since the other ranks of this machine are asked for the same.
        """
        rank, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        blocks = self._blocks(first, stop)
        mine = [block for block in blocks if block // GROUP % ranks == rank % ranks] if share else blocks
        self.cache.fetch_ahead(self._mapped, mine)

    def expect_random_reads(self, yes: bool = True) -> None:
        pass

    def content(self) -> Iterator[bytes]:
        for start in range(0, self.size, PIECE):
            yield self._store.read(self._mapped.name, start, min(start + PIECE, self.size))

    def _next_record(self, at: int) -> int:
        raise UsageError(f"{self.path} is only the place of a remote file: copy the data set to a disk to mend it")

    def starts_record(self, offset: int) -> bool:
        with self.reading():
            if 0 <= offset <= self.size - 8:
                self.bring(offset, offset + 8)
            return super().starts_record(offset)

    def _read(self, offset: int, key: int | None, listed: Any = None) -> tuple[np.ndarray, int]:
        with self.reading():
            payload, end = super()._read(offset, key, listed)
            payload = payload.copy()
        payload.flags.writeable = False
        return payload, end

    def _blocks(self, first: np.ndarray | int, stop: np.ndarray | int) -> list[int]:
        """The blocks with the bytes of these stretches, as far as the file has them, sorted."""
        firsts = np.atleast_1d(np.clip(first, 0, self.size)) // BLOCK
        lasts = (np.atleast_1d(np.clip(stop, 0, self.size)) - 1) // BLOCK
        there = firsts <= lasts
        firsts, lasts = firsts[there], lasts[there]
        found = [firsts, lasts]
        for place in np.flatnonzero(lasts - firsts > 1).tolist():
            found.append(np.arange(firsts[place] + 1, lasts[place]))
        return np.unique(np.concatenate(found)).tolist()
