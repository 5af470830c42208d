"""The index of one shard: which records a ``.rec`` file has, and which of them are images."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DamagedRecord, UsageError
from ..remote.mirror import record_file
from .cache import cached_arrays, stamp
from .labels import FLOAT32_EXACT
from .recordio import ImageRecord, RecordFile, unpack_image

_PROBES = 16  # places where the .idx is compared with the .rec on opening
_REMOTE_PROBES = 2  # the first and the last: each may have to be fetched
_LAST = 8  # records at the end whose ids are looked at, too
_BLOCK = 1 << 26  # bytes of text parsed at a time: so many that malloc gives the memory back to the system
_WORTH_CACHING = 1 << 16  # bytes of text: less is parsed as fast as a cache opens
_LARGEST = (1 << 63) - 1
_SEARCHED = 1 << 16  # offsets that are compared at a time
_VERSION = 2  # of the cache's content; in its name, so that two versions of pfc do not replace each other's


@dataclass(frozen=True)
class Shard:
    """One ``.rec`` file with its index, in the order of the keys; image i is record ``first + i``.

    ``keys``: int64 or uint32 [records], or a range where they are evenly spaced; ``offsets``: int64 [records],
    bytes. Both are mapped from the index's cache where there is one. ``header`` is the InsightFace header record,
    None where there is none. ``ids_are_keys``: each record also carries its key as its id, as MXNet's tools and
    pfc write it, so that a record under another's key is detected.
    """

    file: RecordFile
    keys: Sequence[int] | np.ndarray
    offsets: np.ndarray
    first: int
    images: int
    header: ImageRecord | None
    ids_are_keys: bool = False

    @property
    def identity_records(self) -> int:
        """InsightFace's identity records, which say which images belong to an identity."""
        return len(self.keys) - self.first - self.images

    def read_record(self, position: int) -> ImageRecord:
        """Record ``position`` of the index, of whatever kind. DamagedRecord where it cannot be read."""
        payload = self.read_payload(position)
        try:
            return unpack_image(payload)
        except ValueError as error:
            raise self.error(position, str(error)) from None

    def read_image(self, position: int) -> ImageRecord:
        """As ``read_record``, of an image; DamagedRecord also where it is empty, or the record is another key's."""
        record = self.read_record(position)
        if len(record.image) == 0:
            raise self.error(position, "its image is empty")
        if self.ids_are_keys and record.id != int(self.keys[position]):
            raise self.error(position, f"says that it is key {record.id}: its id or the index is damaged")
        return record

    def read_payload(self, position: int) -> np.ndarray:
        """The bytes of record ``position``, uint8; errors as ``read_record``."""
        listed = partial(self._lists, position + 1)
        return self.file.read(int(self.offsets[position]), key=int(self.keys[position]), listed=listed)

    def length(self, position: int) -> int:
        """Bytes that record ``position`` takes in the file, with its frame and padding; errors as ``read_record``."""
        offset, listed = int(self.offsets[position]), partial(self._lists, position + 1)
        return self.file.end(offset, key=int(self.keys[position]), listed=listed) - offset

    def _lists(self, next_position: int, offset: int) -> bool:
        """Whether the index lists a record at ``offset``; most likely it is the next one."""
        if next_position < len(self.offsets) and int(self.offsets[next_position]) == offset:
            return True
        blocks = (self.offsets[at : at + _SEARCHED] for at in range(0, len(self.offsets), _SEARCHED))
        return any(bool(np.any(block == offset)) for block in blocks)

    def error(self, position: int, what: str) -> DamagedRecord:
        """The error that names record ``position`` and says what is wrong with it."""
        return DamagedRecord(self.file.path, int(self.keys[position]), int(self.offsets[position]), what)


def open_shard(rec: Path, idx: Path, *, strict: bool = True) -> Shard:
    """Map ``rec`` and read ``idx``; UsageError where a file is missing or the two do not belong together.

    Not ``strict``: a ``.rec`` of which more than a quarter is lost or damaged is taken, too; its records then name
    their damage one by one.
    """
    file = record_file(rec)
    file.expect_random_reads()  # a few probes: on a cold disk each would have its neighbourhood read, too
    keys, offsets = load_index(rec, idx)
    probes = np.unique(np.linspace(0, len(keys) - 1, _REMOTE_PROBES if file.is_remote else _PROBES).astype(np.int64))
    if not strict:
        probes = probes[offsets[probes] < file.size]
    missed = [position for position in probes if not file.starts_record(int(offsets[position]))]
    if 4 * len(missed) > (1 if strict else 3) * len(probes):  # fewer may be damaged records, which reading names
        position = missed[0]
        raise _stranger(rec, idx, f"no record starts at byte {offsets[position]}, where key {keys[position]} should")

    whole = Shard(file, keys, offsets, 0, len(keys), None)
    whole = replace(whole, ids_are_keys=_ids_are_keys(whole, probes))
    header, first, end = _layout(whole)
    if header is not None and strict and end < len(keys):
        stop = header.labels[0]
        if int(keys[end]) == stop < FLOAT32_EXACT and end - first != stop - 1:
            counted = f"it lists {end - first} of the {stop - 1:.0f} images that the header record counts"
            raise _stranger(rec, idx, counted)
    file.expect_random_reads(False)
    return replace(whole, first=first, images=end - first, header=header)


def load_index(rec: Path, idx: Path) -> tuple[Sequence[int] | np.ndarray, np.ndarray]:
    """Keys (a range where evenly spaced) and offsets of ``idx`` in ascending order of the keys; each key once.

    A large index is cached as arrays next to ``idx``, and mapped from there as long as neither file changes.
    """
    try:
        small = idx.stat().st_size < _WORTH_CACHING
    except FileNotFoundError:
        raise UsageError(
            f"{idx}: no such file; bring the index that was written with {rec.name}, or make one from it: "
            f"pfc inspect --rebuild-index {rec}"
        ) from None
    if small:
        return _evenly(*_sorted(*read_index(idx), idx))
    cache = idx.with_name(f"{idx.name}.{_VERSION}.cache")
    about: dict[str, Any] = {"index": idx.name, "idx": stamp(idx), "rec": stamp(rec)}
    spaced, keys, offsets = cached_arrays(cache, about, [idx, rec], partial(_index_arrays, idx))
    return range(*spaced.tolist()) if len(spaced) else keys, offsets


def _index_arrays(idx: Path) -> list[np.ndarray]:
    """[start, stop, step] of evenly spaced keys, else nothing; the keys, where they are not; the offsets."""
    keys, offsets = _evenly(*_sorted(*read_index(idx), idx))
    if isinstance(keys, range):
        return [np.array([keys.start, keys.stop, keys.step], dtype=np.int64), np.empty(0, dtype=np.uint32), offsets]
    return [np.empty(0, dtype=np.int64), np.asarray(keys), offsets]


def read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets, int64 [records] each, of an ``.idx`` file, in its order."""
    blocks = [_parse(path, text) for text in _blocks_of_lines(path)]
    if not sum(map(len, blocks)):
        raise UsageError(f"{path} lists no record: {_REBUILD}")
    return np.concatenate([block[:, 0] for block in blocks]), np.concatenate([block[:, 1] for block in blocks])


_REBUILD = "bring the index that was written with its .rec, or rebuild it: pfc inspect --rebuild-index --force"


def _blocks_of_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while text := file.read(_BLOCK):
            yield text + file.readline()


def _parse(path: Path, text: bytes) -> np.ndarray:
    """int64 [lines, 2] of the text's lines."""
    text = text.replace(b"\r\n", b"\n") + (b"" if text.endswith(b"\n") else b"\n")
    characters = np.frombuffer(text, dtype=np.uint8)
    gaps = characters[characters <= ord(" ")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # how older numpy says that the text is no list of numbers
        try:
            numbers = np.fromstring(text, dtype=np.int64, sep=" ")
        except (ValueError, DeprecationWarning):
            numbers = np.empty(0, dtype=np.int64)
    ends = gaps == ord("\n")
    if len(numbers) != len(gaps) or len(gaps) % 2 or ends[::2].any() or not ends[1::2].all():
        raise UsageError(f"{path} is no index: its lines must be 'key<tab>offset', whole numbers; {_REBUILD}")
    return numbers.reshape(-1, 2)


def _sorted(keys: np.ndarray, offsets: np.ndarray, idx: Path) -> tuple[np.ndarray, np.ndarray]:
    steps = np.diff(keys)
    if np.any(steps <= 0):
        order = np.argsort(keys, kind="stable")
        keys, offsets = keys[order], offsets[order]
        steps = np.diff(keys)
    if np.any(steps == 0):
        twice = keys[:-1][steps == 0][0]
        raise UsageError(f"{idx}: key {twice} is listed more than once; {_REBUILD}")
    return keys, offsets


def _evenly(keys: np.ndarray, offsets: np.ndarray) -> tuple[Sequence[int] | np.ndarray, np.ndarray]:
    """Keys as a range where they are one, which costs nothing; else as uint32 where they fit."""
    first, last = int(keys[0]), int(keys[-1])
    step = (last - first) // max(1, len(keys) - 1) or 1
    if np.all(np.diff(keys) == step):
        return range(first, last + 1, step), offsets
    return (keys.astype(np.uint32) if first >= 0 and last < 1 << 32 else keys), offsets


def _place(keys: Sequence[int] | np.ndarray, key: int) -> int:
    """How many of the ascending ``keys`` are smaller than ``key``."""
    if isinstance(keys, range):
        return min(max(0, -((keys.start - key) // keys.step)), len(keys))
    return int(np.searchsorted(keys, key))


def _stranger(rec: Path, idx: Path, what: str) -> UsageError:
    return UsageError(
        f"{idx} does not belong to {rec.name}, or one of them was changed or cut short: {what}; {_REBUILD}"
    )


def _ids_are_keys(whole: Shard, probes: np.ndarray) -> bool:
    """Whether most of the probed records that can be read carry their key as their id, and those at the end too."""
    same: list[bool] = []
    for position in map(int, probes):
        with suppress(DamagedRecord):
            same.append(whole.read_record(position).id == int(whole.keys[position]))
    return 2 * sum(same) > len(same) and not _ends_with_others(whole)


def _ends_with_others(whole: Shard) -> bool:
    """Whether the last records, two at least, lie in the order of the keys and have ascending ids that are not theirs.

    So ends a file that was joined from others, or from which something was left out, while each record kept its id:
    from some place on no id is the key. One record, or one out of order, is damage instead.
    """
    last = len(whole.keys) - 1
    if whole.offsets[last] >= whole.file.size:  # the file was cut short
        last = int(np.flatnonzero(whole.offsets < whole.file.size).max(initial=0))
    ids: list[int] = []
    for position in range(last, max(-1, last - _LAST), -1):
        if position < last and whole.offsets[position] > whole.offsets[position + 1]:
            return False
        with suppress(DamagedRecord):
            found = whole.read_record(position).id
            if found == int(whole.keys[position]):
                break
            ids.append(found)
    return len(ids) > 1 and all(before < here for here, before in pairwise(ids))


def _layout(whole: Shard) -> tuple[ImageRecord | None, int, int]:
    """The header record, and the positions [first, end) of the images.

    InsightFace's header record stands under key 0 and has labels and no image; identity records without images end the
    file. Where the header is damaged, they alone show the convention. Otherwise every record is an image (im2rec).
    """
    records = len(whole.keys)
    every_one = None, 0, records
    if int(whole.keys[0]) != 0:
        return every_one
    try:
        header = whole.read_record(0)
    except DamagedRecord:
        end = _identities_start(whole)
        return (None, 1, end) if end < records else every_one
    if not header.flag or len(header.image):
        return every_one
    counted = header.labels[0]
    end = records
    if math.isfinite(counted) and counted >= 1:
        end = _place(whole.keys, min(int(counted), _LARGEST))
    if counted >= FLOAT32_EXACT or not _is_identity(whole, end) or _is_identity(whole, end - 1):
        end = _identities_start(whole)  # beyond 2²⁴ the float32 count is rounded; or it is damaged
    if end <= 1:
        raise whole.error(0, "a header record, and no image follows")
    return header, 1, end


def _identities_start(whole: Shard) -> int:
    """The position of the first of the identity records that end the shard; the number of records without any.

    There may be millions: the steps back are doubled until they meet an image, and the last one is halved.
    """
    end, step = len(whole.keys), 1
    while end - step >= 1 and _is_identity(whole, end - step):
        step *= 2
    places = range(max(1, end - step + 1), end - step // 2)
    return places.start + bisect_left(places, True, key=partial(_is_identity, whole))


def _is_identity(whole: Shard, position: int) -> bool:
    """Whether the record has labels and no image; a position behind the last record counts as one."""
    if position == len(whole.keys):
        return True
    try:
        record = whole.read_record(position)
    except DamagedRecord:
        return False
    return record.flag > 0 and len(record.image) == 0
