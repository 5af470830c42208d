"""RecordIO: how MXNet frames records in a ``.rec`` file, and packs an image and its label into one.

    record:  u32 magic · u32 (cflag << 29 | length) · payload · zeros up to a multiple of 4
    .idx:    one text line ``key\\toffset`` a record, the offset in bytes
    image:   u32 flag · f32 label · u64 id · u64 id2 · flag × f32 labels · the encoded image

The magic never occurs at a 4-byte-aligned place inside a stored payload: the writer cuts the payload there,
leaves the magic out and writes the parts with cflag 1 (first), 2 (middle) and 3 (last); the reader puts it
back. A record in one piece has cflag 0.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from .errors import UsageError

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
MAX_PAYLOAD = (1 << 29) - 1  # bytes: the length has 29 bits

_FRAME = struct.Struct("<II")
_IMAGE = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)


class RecordError(UsageError):
    """A record that cannot be read: damaged, or not what its place in the file promises.

    Attributes: ``path`` of the file, ``key`` of the record (None where unknown), ``offset`` in bytes,
    ``what`` is wrong.
    """

    def __init__(self, path: Path, key: int | None, offset: int, what: str) -> None:
        record = "record" if key is None else f"key {key}"
        super().__init__(f"{path}: {record} at byte {offset}: {what}")
        self.path, self.key, self.offset, self.what = path, key, offset, what


class ImageRecord(NamedTuple):
    """An unpacked image record.

    ``labels`` are its float32 labels [1] or [flag]; ``image`` is the encoded image, uint8 [bytes], empty in
    header and identity records.
    """

    flag: int
    labels: tuple[float, ...]
    id: int
    image: np.ndarray


def pack_image(labels: float | Sequence[float], image: bytes, *, id: int = 0) -> bytes:
    """The payload of an image record: a single label (flag 0) or a sequence of them (flag = how many)."""
    if isinstance(labels, Sequence):
        return _IMAGE.pack(len(labels), 0.0, id, 0) + struct.pack(f"<{len(labels)}f", *labels) + image
    return _IMAGE.pack(0, labels, id, 0) + image


def unpack_image(payload: np.ndarray) -> ImageRecord:
    """Take an image record apart; ``image`` is a view of ``payload`` (uint8 [bytes]).

    Raises ValueError where the payload is too short to be an image record.
    """
    if len(payload) < _IMAGE.size:
        raise ValueError(f"its {len(payload)} bytes are too few for an image record, which starts with {_IMAGE.size}")
    flag, label, id, _ = _IMAGE.unpack_from(payload.data)
    body = _IMAGE.size + 4 * flag
    if len(payload) < body:
        raise ValueError(f"it announces {flag} labels, more than its {len(payload)} bytes can hold")
    labels = struct.unpack_from(f"<{flag}f", payload.data, _IMAGE.size) if flag else (label,)
    return ImageRecord(flag, labels, id, payload[body:])


def frame(payload: bytes) -> bytes:
    """The bytes that a ``.rec`` file stores for ``payload``: frame header(s), the payload, padding."""
    if len(payload) > MAX_PAYLOAD:
        raise UsageError(f"a record holds at most {MAX_PAYLOAD} bytes, this one has {len(payload)}: store it smaller")
    cuts = _aligned_magics(payload)
    starts = [0, *(cut + 4 for cut in cuts)]
    ends = [*cuts, len(payload)]
    cflags = [_FIRST, *[_MIDDLE] * (len(cuts) - 1), _LAST] if cuts else [_WHOLE]
    stored: list[bytes] = []
    for cflag, start, end in zip(cflags, starts, ends, strict=True):
        stored += [_FRAME.pack(MAGIC, cflag << 29 | (end - start)), payload[start:end]]
    stored.append(bytes(-len(payload) % 4))
    return b"".join(stored)


def _aligned_magics(payload: bytes) -> list[int]:
    """Places of the magic in ``payload`` that are multiples of 4."""
    found: list[int] = []
    at = payload.find(MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            found.append(at)
        at = payload.find(MAGIC_BYTES, at + 1)
    return found


class RecordFile:
    """One ``.rec`` file, mapped into memory. Reading is thread-safe; only a record in parts is copied."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise UsageError(f"{path}: no such file; check the path") from None
        except ValueError:  # an empty file cannot be mapped
            raise UsageError(f"{path} is empty: copy or pack it again") from None
        self.bytes: np.ndarray = np.frombuffer(self._map, dtype=np.uint8)
        self.size: int = len(self.bytes)

    def starts_record(self, offset: int) -> bool:
        """Whether a record, whole or in parts, may start at ``offset``."""
        if offset % 4 or not 0 <= offset <= self.size - 8:
            return False
        magic, word = _FRAME.unpack_from(self._map, offset)
        return magic == MAGIC and word >> 29 in (_WHOLE, _FIRST)

    def read(self, offset: int, *, key: int | None = None, limit: int | None = None) -> np.ndarray:
        """The payload (uint8 [bytes], read-only) of the record at ``offset``.

        ``limit`` is the offset of the next record that the index knows (default: the end of the file): a
        record that runs into it has a damaged length.
        """
        return self._read(offset, key, self.size if limit is None else limit)[0]

    def end(self, offset: int, *, key: int | None = None) -> int:
        """Where the record at ``offset`` ends, its padding included: the next record starts there."""
        return self._read(offset, key, self.size)[1]

    def _read(self, offset: int, key: int | None, limit: int) -> tuple[np.ndarray, int]:
        start, size, cflag = self._part(offset, offset, key, limit)
        end = start + size + -size % 4
        if cflag == _WHOLE:
            payload = self.bytes[start : start + size]
        elif cflag == _FIRST:
            parts = [bytes(self._map[start : start + size])]
            while cflag != _LAST:
                start, size, cflag = self._part(end, offset, key, limit)
                if cflag not in (_MIDDLE, _LAST):
                    raise RecordError(self.path, key, offset, "its last part is missing")
                parts.append(bytes(self._map[start : start + size]))
                end = start + size + -size % 4
            payload = np.frombuffer(MAGIC_BYTES.join(parts), dtype=np.uint8)
        else:
            raise RecordError(self.path, key, offset, "the middle of a record, not its start")
        # Between the end and the limit there may be records that the index leaves out, never anything else.
        if end < min(limit, self.size) and not self.starts_record(end):
            raise RecordError(self.path, key, offset, f"damaged: no record follows where it should end, at byte {end}")
        return payload, end

    def _part(self, at: int, offset: int, key: int | None, limit: int) -> tuple[int, int, int]:
        """(start of the payload, its bytes, cflag) of the part at ``at`` of the record at ``offset``."""
        if at < 0 or at + 8 > self.size:
            raise RecordError(self.path, key, offset, f"runs past the end of the file, at byte {self.size}")
        magic, word = _FRAME.unpack_from(self._map, at)
        if magic != MAGIC:
            raise RecordError(self.path, key, offset, f"damaged: no record starts at byte {at}")
        size = word & MAX_PAYLOAD
        end = at + 8 + size
        if end > self.size:
            raise RecordError(self.path, key, offset, f"runs past the end of the file, at byte {self.size}")
        if end > limit:
            raise RecordError(self.path, key, offset, f"damaged: runs into the next record, at byte {limit}")
        return at + 8, size, word >> 29


class RecordWriter:
    """Writes one ``.rec`` file and the ``.idx`` beside it.

    Attributes: ``records`` and ``size`` (bytes) written so far; ``sha256``, the hexadecimal digest of the
    ``.rec``. Neither file may exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rec = path.open("xb")
        self._idx = path.with_suffix(".idx").open("x", encoding="ascii", newline="\n")
        self._hash = hashlib.sha256()
        self.records = 0
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, key: int, payload: bytes) -> int:
        """Append one record; returns its offset in bytes. ``key`` must be new to the file."""
        stored = frame(payload)
        offset = self.size
        self._rec.write(stored)
        self._idx.write(f"{key}\t{offset}\n")
        self._hash.update(stored)
        self.records += 1
        self.size += len(stored)
        return offset

    def close(self) -> None:
        self._rec.close()
        self._idx.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
