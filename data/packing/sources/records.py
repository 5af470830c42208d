"""One or several RecordIO data sets: images that are packed already."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple
from uuid import uuid4

import numpy as np

from ...errors import DamagedRecord, UsageError
from ...records.dataset import RecordDataset
from ...records.joint import JointDataset
from ...records.labels import LabelEncoding, decode_label, encode_label, encoding_for
from ...records.manifest import printable
from ...records.recordio import RecordFile, unpack_image
from ...remote.mirror import address_of, record_file
from ..storing import Storing
from .base import LazyTexts, Numbers, Source
from .codes import NameCodes, codes_of, names_of

Joining = Literal["apart", "shared"]
"""Identities of several data sets: all different, or the same where their names are."""


class RecordSource(Source):
    """The images of the data sets at ``paths``, of either convention; their records keep all that need not change.

    Several sets get one label space. ``joining`` "apart": the identities of the first set, then those of the
    second, ..., named set/name. "shared": equal names, or numbers where there are no names, are one identity.
    """

    whole_records = True

    def __init__(self, paths: Sequence[Path], *, joining: Joining = "apart") -> None:
        self.sets = [RecordDataset.open(path) for path in paths]
        self._joint = JointDataset(self.sets)
        self.about = printable(", ".join(f"recordio {address_of(path) or path.resolve()}" for path in paths))
        self._recs = list(dict.fromkeys(shard.file.path for dataset in self.sets for shard in dataset.shards))
        self._in_file = {
            shard.file.path: shard.offsets if np.all(shard.offsets[1:] > shard.offsets[:-1]) else np.sort(shard.offsets)
            for dataset in self.sets
            for shard in dataset.shards
        }
        self._rec_number = {rec: number for number, rec in enumerate(self._recs)}
        if len(self._recs) < sum(len(dataset.shards) for dataset in self.sets):
            raise UsageError("one of the sources is given twice: name each data set once")
        self.image_size = self._joint.image_size

        each = [codes_of(dataset.labels(damaged=-1)) for dataset in self.sets]
        names = [
            names_of(numbers, dataset.identity_names()) for dataset, (numbers, _) in zip(self.sets, each, strict=True)
        ]
        if len(self.sets) == 1:
            (self.numbers, self.codes), self.names = each[0], names[0]
            self.told = self.sets[0].told_classes
        elif joining == "shared":
            _refuse_names_among_numbers(self.sets, names)
            joint = NameCodes()
            given = [np.array([joint.code(name) for name in set_names], dtype=np.int32) for set_names in names]
            self.names, self.numbers, _, rank = joint.finish()
            self.codes = _joined(
                [(rank[codes_given], codes) for codes_given, (_, codes) in zip(given, each, strict=True)]
            )
        else:
            firsts = [0, *accumulate(len(numbers) for numbers, _ in each)]
            self.codes = _joined(
                [
                    (np.arange(first, first + len(numbers), dtype=np.int32), codes)
                    for first, (numbers, codes) in zip(firsts, each, strict=False)
                ]
            )
            self.names = SetNames([dataset.name for dataset in self.sets], names)
        self.rejected = [(self.describe(i), self._why(i)) for i in np.flatnonzero(self.codes < 0).tolist()]

    def reader(self, store: Storing, identities: int, *, shuffled: bool) -> RecordReader:
        return RecordReader(self._recs, store, encoding_for(identities), shuffled)

    def task(self, image: int, label: int) -> RecordTask:
        which, within = self._joint.set_of(image)
        shard, position = self.sets[which].locate(within)
        offset, offsets = int(shard.offsets[position]), self._in_file[shard.file.path]
        following = int(np.searchsorted(offsets, offset, side="right"))
        return RecordTask(
            self._rec_number[shard.file.path],
            int(shard.keys[position]),
            offset,
            int(offsets[following]) if following < len(offsets) else shard.file.size,
            self.sets[which].label_encoding,
            label,
        )

    def describe(self, image: int) -> str:
        task = self.task(image, 0)
        return f"{self._recs[task.rec]} key {task.key}"

    def content(self) -> Iterator[bytes]:
        yield from super().content()
        for dataset in self.sets:
            for shard in dataset.shards:
                yield f"{shard.file.path.resolve()} {shard.file.size}\0".encode("utf-8", "surrogateescape")

    def _why(self, image: int) -> str:
        try:
            self._joint.read(image)
        except DamagedRecord as error:
            return error.reason
        raise AssertionError(f"image {image} was damaged, and is not any more")


class RecordTask(NamedTuple):
    """Where a record lies, and the next one by the index; how its label is encoded, and the label that it gets."""

    rec: int
    key: int
    offset: int
    following: int
    encoding: LabelEncoding
    label: int


class RecordReader:
    """Gives the record of a task with its new label; byte for byte the old one where that is the same."""

    def __init__(self, recs: Sequence[Path], store: Storing, encoding: LabelEncoding, shuffled: bool) -> None:
        self.run = uuid4().hex
        self.recs = recs
        self.store = store
        self.encoding: LabelEncoding = encoding
        self.shuffled = shuffled

    def __call__(self, task: RecordTask) -> bytes | str:
        file = _open(self.run, self.recs[task.rec], self.shuffled)
        try:
            payload = file.read(task.offset, key=task.key, listed=task.following.__eq__).tobytes()
            record = unpack_image(np.frombuffer(payload, dtype=np.uint8))
            label = decode_label(record.labels, task.encoding)
        except DamagedRecord as error:
            return error.reason
        except ValueError as error:
            return str(error)
        body = len(payload) - len(record.image)
        image = payload[body:]
        stored = self.store(image)
        if isinstance(stored, str):
            return stored
        head = payload[:body]
        if label != task.label or task.encoding != self.encoding:
            head = relabelled(head, task.encoding, task.label, self.encoding)
        return head + stored


def relabelled(head: bytes, old: LabelEncoding, label: int, new: LabelEncoding) -> bytes:
    """An image record's head with another label; its ids stay, and further labels if the encoding can store them."""
    (flag,) = struct.unpack_from("<I", head)
    stored = encode_label(label, new)
    if isinstance(stored, tuple):
        return struct.pack("<If", 2, 0.0) + head[8:24] + struct.pack("<2f", *stored)
    if flag == 0 or old == "float32x2":
        return struct.pack("<If", 0, stored) + head[8:24]
    return head[:24] + struct.pack("<f", stored) + head[28:]


@lru_cache(maxsize=1024)
def _open(run: str, rec: Path, shuffled: bool) -> RecordFile:
    """Once in each process; ``run``, new each time, keeps a later call from seeing old files."""
    file = record_file(rec)
    file.expect_random_reads(shuffled)
    return file


def _refuse_names_among_numbers(sets: Sequence[RecordDataset], names: Sequence[Sequence[str]]) -> None:
    """UsageError where one set has names and another numbers, most likely because its names were lost."""
    numbered = [isinstance(own, Numbers) for own in names]
    if all(numbered) or not any(numbered):
        return
    with_names, without = numbered.index(False), numbered.index(True)
    if set(names[with_names]).isdisjoint(names[without]):
        lost = sets[without].path
        raise UsageError(
            f"{sets[with_names].path} has names of its identities and {lost} numbers alone, so none would be shared: "
            f"bring the labels.json of {lost}, or leave out --labels shared"
        )


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The codes of all sets, one after the other: ``parts`` are (new code of each code, codes)."""
    return np.concatenate([np.where(codes < 0, -1, np.append(new, -1)[codes]) for new, codes in parts]).astype(np.int32)


class SetNames(LazyTexts):
    """The names of several sets, one after the other, as set/name; sets of one name are numbered."""

    def __init__(self, sets: Sequence[str], names: Sequence[Sequence[str]]) -> None:
        self._sets = [
            name if sets.count(name) == 1 else f"{name}-{1 + sets[:number].count(name)}"
            for number, name in enumerate(sets)
        ]
        self._names = names
        self._starts = [0, *accumulate(map(len, names))]

    def __len__(self) -> int:
        return self._starts[-1]

    def text(self, place: int) -> str:
        at = bisect_right(self._starts, place) - 1
        return f"{self._sets[at]}/{self._names[at][place - self._starts[at]]}"
