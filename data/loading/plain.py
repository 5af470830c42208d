"""Reads plain records (``records.plain_records`` defines them) many at once, by the compiled passes of ``plain.c``.

The passes are compiled when pfc is installed, if there is a C compiler. Without them every record is read by
``RecordDataset.read``, one after the other.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ..records.dataset import RecordDataset
from ..records.index import Shard
from ..records.joint import JointDataset
from ..records.labels import FLOAT32_EXACT
from ..remote.mirror import RemoteRecordFile

_VERSION = 2  # pfc_plain_version of plain.c
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Shard(ctypes.Structure):
    """As in ``plain.c``."""

    _fields_ = (
        ("bytes", _POINTER),
        ("size", _INT),
        ("offsets", _POINTER),
        ("records", _INT),
        ("start", _INT),
        ("images", _INT),
        ("first", _INT),
        ("first_label", _INT),
        ("classes", _INT),
        ("checks_keys", _INT),
        ("keys", _POINTER),
        ("key_start", _INT),
        ("key_step", _INT),
    )


_FIELDS = ("shard", "label", "begin", "end", "height", "width", "closed")  # of a place, as in plain.c
_PLACE = np.dtype([(name, np.int64) for name in _FIELDS])


@cache
def compiled() -> ctypes.CDLL | None:
    """The compiled passes, or None where this installation has none or PFC_COMPILED is 0."""
    if os.environ.get("PFC_COMPILED") == "0":
        return None
    for path in sorted(Path(__file__).parent.glob("_plain.*so")):
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # compiled elsewhere
            continue
        if loaded.pfc_plain_version() == _VERSION:
            loaded.pfc_plain_find.argtypes = [_POINTER, _INT, _POINTER, _INT, _POINTER]
            loaded.pfc_plain_copy.argtypes = [_POINTER, _POINTER, _INT, _INT, _POINTER]
            loaded.pfc_plain_will_need.argtypes = [_POINTER, _INT, _POINTER, _INT, _INT]
            for function in (loaded.pfc_plain_find, loaded.pfc_plain_will_need, loaded.pfc_plain_copy):
                function.restype = None
            return loaded
    return None


class PlainRecords:
    """Finds the samples with plain records that end where the index says that the next one starts, and whose images
    have no ``headers.header_problem``. All others are left to ``RecordDataset.read``."""

    def __init__(self, dataset: RecordDataset | JointDataset) -> None:
        self._shards: list[Shard] = []
        table: list[_Shard] = []
        start = first_label = 0
        for part in dataset.sets if isinstance(dataset, JointDataset) else [dataset]:
            classes = min(part.num_classes, FLOAT32_EXACT) if part.label_encoding == "float32" else 0
            for shard in part.shards:
                self._shards.append(shard)
                table.append(_entry(shard, start, first_label, classes))
                start += shard.images
            first_label += part.num_classes
        self.table = (_Shard * len(table))(*table)
        self.files = [shard.file for shard in self._shards]
        self._starts = np.array([entry.start for entry in table])
        self._remote = [file.is_remote for file in self.files]

    def find(self, samples: NDArray[np.int64]) -> PlainImages:
        """Labels and encoded images as of ``RecordDataset.read``, of ``samples``, int64 [b].

        The images stay where they lie; those of data sets with remote files are copied.
        """
        places = np.zeros(len(samples), dtype=_PLACE)
        places["label"] = -1
        found = PlainImages(self.table, [file.bytes for file in self.files], places)
        if (loaded := compiled()) is None:
            return found
        samples = np.ascontiguousarray(samples, dtype=np.int64)
        with ExitStack() as held:
            for file, first, stop in self._remote_stretches(samples):
                held.enter_context(file.reading())
                file.bring(first, stop)
            loaded.pfc_plain_find(self.table, len(self.table), samples.ctypes.data, len(samples), places.ctypes.data)
            found.labels = places["label"].copy()
            return found.copied() if any(self._remote) else found

    def will_need(self, samples: NDArray[np.int64]) -> None:
        """Asks for the records of ``samples``, int64 [b], before they are read; returns at once."""
        for file, first, stop in self._remote_stretches(samples):
            file.fetch_soon(first, stop)
        if (loaded := compiled()) is not None:
            samples = np.ascontiguousarray(samples, dtype=np.int64)
            loaded.pfc_plain_will_need(self.table, len(self.table), samples.ctypes.data, len(samples), mmap.PAGESIZE)

    def _remote_stretches(
        self, samples: NDArray[np.int64]
    ) -> Iterator[tuple[RemoteRecordFile, NDArray[np.int64], NDArray[np.int64]]]:
        """Of each remote file: where the records of ``samples`` begin and end by the index, in bytes."""
        if not any(self._remote):
            return
        which = np.searchsorted(self._starts, samples, side="right") - 1
        for place in np.unique(which).tolist():
            shard = self._shards[place]
            if isinstance(shard.file, RemoteRecordFile):
                records = shard.first + samples[which == place] - int(self._starts[place])
                following = np.minimum(records + 1, len(shard.offsets) - 1)
                last = records + 1 == len(shard.offsets)
                stops = np.where(last, shard.file.size, np.asarray(shard.offsets)[following])
                yield shard.file, np.asarray(shard.offsets)[records], stops


class PlainImages(Sequence[NDArray[np.uint8]]):
    """The encoded images of some samples, uint8 [bytes] each, read-only, where they lie in the files.

    Attributes:
        labels: int64 [b]; −1 where the sample is not plain: its image must not be asked for.
    """

    def __init__(self, table: Any, files: Sequence[NDArray[np.uint8]], places: NDArray[np.void]) -> None:
        self._table, self._files, self._places = table, files, places
        self.labels: NDArray[np.int64] = places["label"].copy()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, place: slice) -> list[NDArray[np.uint8]]: ...
    def __getitem__(self, place: int | slice) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        shard, _, begin, end, *_ = self._places[place].item()
        return self._files[shard][begin:end]

    def have_size(self, size: tuple[int, int]) -> bool:
        """Whether every image is of this (height, width), as ``headers.header_size`` says."""
        return bool(((self._places["height"] == size[0]) & (self._places["width"] == size[1])).all())

    def copied(self) -> PlainImages:
        """The same with the images in memory of their own."""
        plain = np.flatnonzero(self.labels >= 0)
        places = self._places.copy()
        ends = np.cumsum(places["end"][plain] - places["begin"][plain])
        content = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
        for place, end in zip(plain.tolist(), ends.tolist(), strict=True):
            image = self[place]
            content[end - len(image) : end] = image
        places["shard"] = 0
        places["begin"][plain] = ends - (places["end"][plain] - places["begin"][plain])
        places["end"][plain] = ends
        content.flags.writeable = False
        table = (_Shard * 1)(_Shard(bytes=content.ctypes.data, size=len(content)))
        return PlainImages(table, [content], places)

    def rows(self) -> NDArray[np.uint8] | None:
        """The images in the rows of a matrix [b, bytes of the longest], filled up with zeros, for a decoder to read.

        None where that would take more than twice the memory, or where a decoder might read past the end of an image:
        of one that was cut short or damaged, say. What it makes of that must not depend on the other rows.
        """
        lengths = self._places["end"] - self._places["begin"]
        width = int(lengths.max())
        if not self._places["closed"].all() or width * len(self) > 2 * int(lengths.sum()):
            return None
        loaded, rows = compiled(), np.empty((len(self), width), dtype=np.uint8)
        assert loaded is not None
        loaded.pfc_plain_copy(self._table, self._places.ctypes.data, len(self), width, rows.ctypes.data)
        return rows


def _entry(shard: Shard, start: int, first_label: int, classes: int) -> _Shard:
    keys, offsets = shard.keys, shard.offsets
    evenly = keys if isinstance(keys, range) else range(0, 1)
    listed = None if isinstance(keys, range) or not shard.ids_are_keys else np.asarray(keys)
    if offsets.dtype != np.int64 or (listed is not None and listed.dtype != np.uint32):
        classes = 0  # nothing that the compiled pass reads
    return _Shard(
        bytes=shard.file.bytes.ctypes.data,
        size=shard.file.size,
        offsets=offsets.ctypes.data,
        records=len(offsets) if offsets.dtype == np.int64 else 0,
        start=start,
        images=shard.images,
        first=shard.first,
        first_label=first_label,
        classes=classes,
        checks_keys=shard.ids_are_keys,
        keys=None if listed is None else listed.ctypes.data,
        key_start=evenly.start,
        key_step=evenly.step,
    )
