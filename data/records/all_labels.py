"""All labels of a data set at once: one sweep over its records, kept beside the data set and mapped from there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DamagedRecord
from ..workers import Progress
from .cache import cached_arrays, stamp
from .labels import FLOAT32_EXACT
from .recordio import MAGIC

if TYPE_CHECKING:
    from .dataset import RecordDataset
    from .index import Shard

_BLOCK = 1 << 18  # images swept at a time
WORTH_CACHING = 1 << 14  # images
_VERSION = 2  # of the cache's content; in its name, as the index's


def load_labels(dataset: RecordDataset, progress: Progress | None = None) -> np.ndarray:
    """Labels [len] of all images, −1 where the record is damaged; int32, or int64 where they do not fit."""
    if len(dataset) < WORTH_CACHING:
        return _read_labels(dataset, progress)
    about, files = labels_origin(dataset)
    place = cache_place(dataset.path, f"labels.{_VERSION}")
    return cached_arrays(place, about, files, lambda: [_read_labels(dataset, progress)])[0]


def labels_origin(dataset: RecordDataset) -> tuple[dict[str, Any], list[Path]]:
    """What the labels are made from, as ``cached_arrays`` takes it, and its files."""
    files = [shard.file.path for shard in dataset.shards]
    files += [path.with_suffix(".idx") for path in files]
    about: dict[str, Any] = {"labels": dataset.told_classes, "encoding": dataset.label_encoding}
    about["files"] = [[path.name, *stamp(path)] for path in files]
    return about, files


def cache_place(path: Path, name: str) -> Path:
    """Where a cache of the data set at ``path`` is kept: in its folder, or beside its ``.rec``."""
    return path / f"{name}.cache" if path.is_dir() else path.with_suffix(f".{name}.cache")


def _read_labels(dataset: RecordDataset, progress: Progress | None) -> np.ndarray:
    labels = np.empty(len(dataset), dtype=np.int32)
    done = 0
    for shard in dataset.shards:
        for first in range(0, shard.images, _BLOCK):
            found = _sweep(dataset, shard, first, min(first + _BLOCK, shard.images))
            if found.max() > np.iinfo(labels.dtype).max:
                labels = labels.astype(np.int64)
            labels[done : done + len(found)] = found
            done += len(found)
            if progress is not None:
                progress(done, len(dataset))
    labels.flags.writeable = False
    return labels


def _sweep(dataset: RecordDataset, shard: Shard, first: int, stop: int) -> np.ndarray:
    """Labels, int64, of the shard's images [first, stop): plain records together, the few others one by one."""
    places = slice(shard.first + first, shard.first + stop)
    labels = np.full(stop - first, -1, dtype=np.int64)
    known = np.zeros(stop - first, dtype=bool)
    # A record in one piece (cflag 0) with one label (flag 0) keeps it in its fourth 32-bit word, its id behind; two
    # labels (flag 2) follow the id.
    two = dataset.label_encoding == "float32x2"
    least = 40 if two else 32  # bytes, with the frame
    offsets, keys = shard.offsets[places], np.asarray(shard.keys[places], dtype=np.int64)
    words = shard.file.bytes[: shard.file.size // 4 * 4].view("<u4")
    fits = np.flatnonzero((offsets % 4 == 0) & (offsets >= 0) & (offsets + least <= shard.file.size))
    at = offsets[fits] // 4
    plain = (words[at] == MAGIC) & (words[at + 1] >> 29 == 0) & (words[at + 1] >= least - 8)
    plain &= words[at + 2] == (2 if two else 0)
    if shard.ids_are_keys:
        plain &= (words[at + 4] == keys[fits] & 0xFFFFFFFF) & (words[at + 5] == keys[fits] >> 32)
    parts = [words[at + word].view("<f4") for word in ((8, 9) if two else (3,))]
    for part in parts:
        plain &= (part >= 0) & (part == np.floor(part)) & (part < FLOAT32_EXACT)
    stored = np.zeros(np.count_nonzero(plain), dtype=np.int64)
    for part in parts:
        stored = stored * FLOAT32_EXACT + part[plain].astype(np.int64)
    inside = stored < (np.iinfo(np.int64).max if dataset.told_classes is None else dataset.told_classes)
    labels[fits[plain][inside]] = stored[inside]
    known[fits[plain][inside]] = True
    for image in np.flatnonzero(~known):
        position = shard.first + first + int(image)
        with suppress(DamagedRecord):
            labels[image] = dataset.decode_label(shard.read_image(position), shard, position)
    return labels
