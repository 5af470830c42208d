"""The index of one shard: which records a ``.rec`` file has, and which of them are images."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import UsageError
from .labels import FLOAT32_EXACT
from .recordio import ImageRecord, RecordError, RecordFile, unpack_image

_PROBES = 16  # places where the .idx is compared with the .rec on opening


@dataclass(frozen=True)
class Shard:
    """One ``.rec`` file with its index, in the order of the keys; image i is record ``first + i``.

    ``keys``, ``offsets``, ``limits``: int64 [records]; limits are where the next record of the index starts
    (or the file's end). ``header`` is the InsightFace header record, None where there is none.
    """

    file: RecordFile
    keys: np.ndarray
    offsets: np.ndarray
    limits: np.ndarray
    first: int
    images: int
    header: ImageRecord | None

    @property
    def identity_records(self) -> int:
        """InsightFace's identity records, which say which images belong to an identity."""
        return 0 if self.header is None else len(self.keys) - 1 - self.images

    def read_record(self, position: int) -> ImageRecord:
        """Record ``position`` of the index. RecordError where it is damaged."""
        key, offset = int(self.keys[position]), int(self.offsets[position])
        payload = self.file.read(offset, key=key, limit=int(self.limits[position]))
        try:
            return unpack_image(payload)
        except ValueError as error:
            raise RecordError(self.file.path, key, offset, str(error)) from None

    def error(self, position: int, what: str) -> RecordError:
        """The error that names record ``position`` and says what is wrong with it."""
        return RecordError(self.file.path, int(self.keys[position]), int(self.offsets[position]), what)


def open_shard(rec: Path, idx: Path) -> Shard:
    """Map ``rec`` and read ``idx``; UsageError where a file is missing or the two do not belong together."""
    file = RecordFile(rec)
    keys, offsets = read_index(idx)
    order = np.argsort(keys, kind="stable") if np.any(np.diff(keys) <= 0) else slice(None)
    keys, offsets = keys[order], offsets[order]
    if np.any(np.diff(keys) == 0):
        twice = keys[:-1][np.diff(keys) == 0][0]
        raise UsageError(f"{idx}: key {twice} stands there more than once; make the index anew from {rec.name}")
    if offsets.min() < 0 or offsets.max() > file.size - 8:
        raise _stranger(rec, idx, f"key {keys[offsets.argmax()]} would start at byte {offsets.max()} of {file.size}")
    probes = np.unique(np.linspace(0, len(keys) - 1, _PROBES).astype(np.int64))
    missed = [position for position in probes if not file.starts_record(int(offsets[position]))]
    if 4 * len(missed) > len(probes):  # a few may be damaged records, which reading names
        position = missed[0]
        raise _stranger(rec, idx, f"no record starts at byte {offsets[position]}, where key {keys[position]} should")

    offsets, limits = _with_limits(offsets, file.size)
    whole = Shard(file, keys, offsets, limits, 0, len(keys), None)
    header = _read_header(whole)
    if header is None:
        return whole  # im2rec's convention: every record is an image
    if not all(math.isfinite(count) and count >= 1 for count in header.labels):
        raise whole.error(0, "its header record counts nothing sensible: the file is damaged")
    stop = first_identity_key(whole, header)
    first, end = np.searchsorted(keys, (1, stop))
    if end - first != stop - 1:
        raise _stranger(rec, idx, f"it lists {end - first} of the {stop - 1} images that the header record counts")
    return Shard(file, keys, offsets, limits, int(first), int(end - first), header)


def read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets, int64 [records] each, of an ``.idx`` file, in its order."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; bring the index that was written with {path.stem}.rec") from None
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # how older numpy says that the text is no list of numbers
        try:
            numbers = np.fromstring(text, dtype=np.int64, sep=" ")
        except (ValueError, DeprecationWarning):
            raise UsageError(f"{path} is no index: its lines must be 'key<tab>offset', whole numbers") from None
    if len(numbers) == 0:
        raise UsageError(f"{path} lists no record; bring the index that was written with {path.stem}.rec")
    lines = text.count(b"\n") + (not text.endswith(b"\n"))
    if len(numbers) != 2 * lines:
        raise UsageError(
            f"{path} is no index: {len(numbers)} numbers in {lines} lines, which should be 'key<tab>offset'"
        )
    table = numbers.reshape(-1, 2)
    return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])


def _stranger(rec: Path, idx: Path, what: str) -> UsageError:
    return UsageError(
        f"{idx} does not belong to {rec.name}, or one of them was changed or cut short: {what}; "
        "bring the pair that was written together"
    )


def _with_limits(offsets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The offsets, and for each record the offset of the one that follows it in the file."""
    if np.all(np.diff(offsets) > 0):  # as nearly always: two views of one array then do for both
        bounds = np.append(offsets, size)
        return bounds[:-1], bounds[1:]
    order = np.argsort(offsets, kind="stable")
    limits = np.empty_like(offsets)
    limits[order[:-1]] = offsets[order[1:]]
    limits[order[-1]] = size
    return offsets, limits


def _read_header(whole: Shard) -> ImageRecord | None:
    """The header record under key 0, which has labels and no image; None where key 0 is an image or missing."""
    if whole.keys[0] != 0:
        return None
    try:
        record = whole.read_record(0)
    except RecordError:
        if len(whole.read_record(len(whole.keys) - 1).image) == 0:
            raise  # identity records end the file: what is damaged is the header
        return None
    return record if record.flag and not len(record.image) else None


def first_identity_key(shard: Shard, header: ImageRecord) -> int:
    """The key after the last image's. The header's float32 count is exact up to 2²⁴, beyond only near it."""
    counted = int(header.labels[0])
    if counted < FLOAT32_EXACT:
        return counted
    error = int(np.spacing(np.float32(counted)))
    first, end = np.searchsorted(shard.keys, (counted - error, counted + error + 1))
    for position in range(int(first), int(end)):
        if len(shard.read_record(position).image) == 0:
            return int(shard.keys[position])
    return int(shard.keys[-1]) + 1  # no identity records: the images go on to the end
