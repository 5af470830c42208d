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
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import numpy as np

from ..errors import DamagedRecord, UsageError
from .mapped import MappedFile, with_descriptors

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
MAX_PAYLOAD = (1 << 29) - 1  # bytes: the length has 29 bits

_MAGIC_ANYWHERE = re.compile(re.escape(MAGIC_BYTES))
_FRAME = struct.Struct("<II")
_IMAGE = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_PIECE = 1 << 24  # bytes
_JPEG_END = b"\xff\xd9"
_PNG_END = b"IEND\xaeB`\x82"


_open = with_descriptors(open)  # a set may have many shards, each with two files


class TooLargeError(UsageError):
    """A payload that no record can hold."""


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


def with_id(payload: bytes, id: int) -> bytes:
    """The payload of an image record with another id; its second one stays."""
    return payload[:8] + struct.pack("<Q", id) + payload[16:]


def frame(payload: bytes) -> bytes:
    """The bytes that a ``.rec`` file stores for ``payload``: frame header(s), the payload, padding."""
    if len(payload) > MAX_PAYLOAD:
        size = len(payload)
        raise TooLargeError(f"a record holds at most {MAX_PAYLOAD} bytes, this one has {size}: store it smaller")
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
    """One ``.rec`` file, mapped into memory. Reading is thread-safe; only a record in parts is copied.

    Attributes: ``path``; ``bytes``, uint8 [size]; ``size``. ``is_remote``: its bytes are here only once they were
    brought, see ``remote.mirror.RemoteRecordFile``. Whoever reads ``bytes`` brings them first, within ``reading``.
    """

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._mapped = self._open()
        except FileNotFoundError:
            raise UsageError(f"{path}: no such file; check the path") from None
        except ValueError:  # an empty file cannot be mapped
            raise UsageError(f"{path} is empty: copy or pack it again") from None
        self._map: memoryview = self._mapped.view
        self.bytes: np.ndarray = self._mapped.bytes
        self.size: int = len(self.bytes)

    def _open(self) -> Any:
        return MappedFile(self.path)

    def reading(self) -> AbstractContextManager[Any]:
        """Within, what was brought can be read."""
        return nullcontext()

    def bring(self, first: np.ndarray | int, stop: np.ndarray | int) -> None:
        """Make the bytes [first, stop) readable, of one stretch or of several, int64 [n]."""

    def expect_random_reads(self, yes: bool = True) -> None:
        """As of ``MappedFile``."""
        self._mapped.expect_random_reads(yes)

    def will_need(self, first: Any, stop: Any) -> None:
        """As of ``MappedFile``."""
        self._mapped.will_need(first, stop)

    def content(self) -> Iterator[bytes]:
        """All bytes, piece by piece, from the file itself."""
        with self.path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece

    def starts_record(self, offset: int) -> bool:
        """Whether a record, whole or in parts, may start at ``offset``."""
        if not 0 <= offset <= self.size - 8:
            return False
        magic, word = _FRAME.unpack_from(self._map, offset)
        return magic == MAGIC and word >> 29 in (_WHOLE, _FIRST)

    def read(self, offset: int, *, key: int | None = None, listed: Callable[[int], bool] | None = None) -> np.ndarray:
        """The payload (uint8 [bytes], read-only) of the record at ``offset``.

        ``listed`` returns whether the index lists a record at an offset. It is called if no record starts where this
        one ends: then one of the two is damaged.
        """
        return self._read(offset, key, listed)[0]

    def end(self, offset: int, *, key: int | None = None, listed: Callable[[int], bool] | None = None) -> int:
        """Where the record at ``offset`` ends, its padding included: the next record starts there."""
        return self._read(offset, key, listed)[1]

    def walk(self, start: int = 0) -> Iterator[tuple[int, int, np.ndarray | None]]:
        """(offset, end, payload) of every record from ``start`` on, by the file alone; payload None for a damaged
        stretch, which ends where the next record that is whole begins."""
        at = start
        while at < self.size:
            try:
                payload, end = self._read(at, None)
            except DamagedRecord:
                payload, end = None, self._next_record(max(start, at - 3))  # the padding before may have lost a byte
            if payload is not None or end > at:
                yield at, end, payload
            at = end

    def _next_record(self, at: int) -> int:
        """Where the first whole record from ``at`` on starts, at any alignment; the file's end if there is none."""
        while found := _MAGIC_ANYWHERE.search(self._map, at):
            at = found.start()
            with suppress(DamagedRecord):
                self._read(at, None)
                return at
            at += 1
        return self.size

    def _read(
        self, offset: int, key: int | None, listed: Callable[[int], bool] | None = None
    ) -> tuple[np.ndarray, int]:
        start, size, cflag = self._part(offset, offset, key)
        end = start + size + -size % 4
        if cflag == _WHOLE:
            payload = self.bytes[start : start + size]
        elif cflag == _FIRST:
            parts = [bytes(self._map[start : start + size])]
            while cflag != _LAST:
                start, size, cflag = self._part(end, offset, key)
                if cflag not in (_MIDDLE, _LAST):
                    raise DamagedRecord(self.path, key, offset, "its last part is missing")
                parts.append(bytes(self._map[start : start + size]))
                end = start + size + -size % 4
            payload = np.frombuffer(MAGIC_BYTES.join(parts), dtype=np.uint8)
        else:
            raise DamagedRecord(self.path, key, offset, "the middle of a record, not its start")
        followed = end >= self.size or self.starts_record(end)
        # Otherwise this length or the next record's start is damaged: the image's end or the index may show which.
        if not (followed or _is_finished(payload) or (listed is not None and listed(end))):
            what = f"damaged: no record follows where it should end, at byte {end}"
            raise DamagedRecord(self.path, key, offset, what)
        return payload, min(end, self.size)

    def _part(self, at: int, offset: int, key: int | None) -> tuple[int, int, int]:
        """(start of the payload, its bytes, cflag) of the part at ``at`` of the record at ``offset``."""
        if at < 0 or at + 8 > self.size:
            raise DamagedRecord(self.path, key, offset, f"runs past the end of the file, at byte {self.size}")
        self.bring(at, at + 8)
        magic, word = _FRAME.unpack_from(self._map, at)
        if magic != MAGIC:
            raise DamagedRecord(self.path, key, offset, f"damaged: no record starts at byte {at}")
        size = word & MAX_PAYLOAD
        start = at + 8
        if start + size > self.size:
            raise DamagedRecord(self.path, key, offset, f"runs past the end of the file, at byte {self.size}")
        self.bring(start, start + size)
        if size >= 4:  # where the payload had the magic, it was cut: what stands here belongs to another record
            inside = np.flatnonzero(np.frombuffer(self._map, "<u4", size // 4, start) == MAGIC)
            if len(inside):
                what = f"damaged: runs into the next record, at byte {start + 4 * int(inside[0])}"
                raise DamagedRecord(self.path, key, offset, what)
        return start, size, word >> 29


def _is_finished(payload: np.ndarray) -> bool:
    """Whether the payload ends as an image record does: behind its labels, or with the last bytes of a JPEG or PNG."""
    try:
        image = unpack_image(payload).image
    except ValueError:
        return False
    return len(image) == 0 or image[-8:].tobytes().endswith((_JPEG_END, _PNG_END))


def cut_back(file: IO[bytes], path: Path, size: int) -> None:
    """Cut off what was written after the first ``size`` bytes; UsageError where the file is shorter."""
    there = os.fstat(file.fileno()).st_size
    if there < size:
        raise UsageError(
            f"{path} has {there} bytes, the interrupted packing had written {size}: some were lost, so it cannot be "
            f"continued: remove {path.parent} and pack again"
        )
    file.truncate(size)


class RecordWriter:
    """Writes one ``.rec`` file and the ``.idx`` next to it.

    Attributes: ``records`` and ``size`` (bytes) written so far; ``sha256``, the hexadecimal digest of the
    ``.rec``. Neither file may exist, except to go on with them: ``start`` is then what ``sync`` returned, and
    what was written after that call is cut off. UsageError where something before it is lost.
    """

    def __init__(self, path: Path, start: tuple[int, int, int] | None = None) -> None:
        self.path = path
        self.records, self.size, index_size = start or (0, 0, 0)
        self._hash = hashlib.sha256()
        mode = "xb" if start is None else "r+b" if self.records else "w+b"
        index = path.with_suffix(".idx")
        self._rec, self._idx = _open(path, mode), _open(index, mode)
        if start is not None:
            cut_back(self._rec, path, self.size)
            cut_back(self._idx, index, index_size)
            while block := self._rec.read(1 << 20):
                self._hash.update(block)
            self._idx.seek(index_size)

    def sync(self) -> tuple[int, int, int]:
        """Bring all records to the disk; returns where the files stand, for ``start``."""
        for file in (self._rec, self._idx):
            file.flush()
            os.fsync(file.fileno())
        return self.records, self.size, self._idx.tell()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, key: int, payload: bytes) -> int:
        """Append one record; returns its offset in bytes. ``key`` must be new to the file."""
        stored = frame(payload)
        offset = self.size
        self._rec.write(stored)
        self._idx.write(b"%d\t%d\n" % (key, offset))
        self._hash.update(stored)
        self.records += 1
        self.size += len(stored)
        return offset

    def close(self) -> None:
        self._rec.close()
        self._idx.close()

    def remove(self) -> None:
        """Close both files and remove them."""
        self.close()
        self.path.unlink()
        self.path.with_suffix(".idx").unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
