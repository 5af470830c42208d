"""Labels of a data set's records: one, or all at once, cached next to the data set and mapped from there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DamagedRecord
from ..workers import Progress
from .cache import cached_arrays, stamp
from .index import Shard
from .labels import FLOAT32_EXACT, LabelEncoding, decode_label
from .plain_records import PLAIN, PLAIN_TWO, find_plain
from .recordio import ImageRecord

_BLOCK = 1 << 18  # images swept at a time
_REMOTE_BLOCK = 1 << 13  # … where all of them have to be fetched
WORTH_CACHING = 1 << 14  # images
_VERSION = 3  # of the cache's content; in its name, as the index's


@dataclass(frozen=True)
class ShardLabels:
    """The labels in a data set's records: one, or all of them.

    path: of the data set. encoding: how a record stores its label. told_classes: how many identities there are, None
    where the data set does not say.
    """

    path: Path
    shards: Sequence[Shard]
    encoding: LabelEncoding
    told_classes: int | None

    def decode(self, record: ImageRecord, shard: Shard, position: int) -> int:
        """The label in an image's record; DamagedRecord if it is not in 0 … told_classes − 1."""
        try:
            label = decode_label(record.labels, self.encoding)
        except ValueError as error:
            raise shard.error(position, str(error)) from None
        if self.told_classes is not None and label >= self.told_classes:
            raise shard.error(
                position,
                f"label {label} is not in 0 … {self.told_classes - 1}, the labels of the data set",
            )
        return label

    def all(self, progress: Progress | None = None) -> np.ndarray:
        """Labels [images], −1 where the record is damaged; int32, or int64 where they do not fit."""
        if sum(shard.images for shard in self.shards) < WORTH_CACHING:
            return self._read(progress)
        about, files = self.origin()
        place = cache_place(self.path, f"labels.{_VERSION}")
        return cached_arrays(place, about, files, lambda: [self._read(progress)])[0]

    def origin(self) -> tuple[dict[str, Any], list[Path]]:
        """What the labels are computed from, as ``cached_arrays`` takes it, and its files."""
        files = [shard.file.path for shard in self.shards]
        files += [path.with_suffix(".idx") for path in files]
        about: dict[str, Any] = {"labels": self.told_classes, "encoding": self.encoding}
        about["files"] = [[path.name, *stamp(path)] for path in files]
        return about, files

    def _read(self, progress: Progress | None) -> np.ndarray:
        images = sum(shard.images for shard in self.shards)
        labels = np.empty(images, dtype=np.int32)
        done = 0
        for shard in self.shards:
            step = _REMOTE_BLOCK if shard.file.is_remote else _BLOCK
            for first in range(0, shard.images, step):
                found = self._sweep(shard, first, min(first + step, shard.images))
                if found.max() > np.iinfo(labels.dtype).max:
                    labels = labels.astype(np.int64)
                labels[done : done + len(found)] = found
                done += len(found)
                if progress is not None:
                    progress(done, images)
        labels.flags.writeable = False
        return labels

    def _sweep(self, shard: Shard, first: int, stop: int) -> np.ndarray:
        """Labels, int64, of the shard's images [first, stop): plain records together, the few others one by one."""
        places = slice(shard.first + first, shard.first + stop)
        labels = np.full(stop - first, -1, dtype=np.int64)
        two = self.encoding == "float32x2"
        plain, heads = find_plain(shard.file, shard.offsets[places], PLAIN_TWO if two else PLAIN)
        parts = list(heads["labels"].T) if two else [heads["label"]]
        valid = np.ones(len(plain), dtype=bool)
        if shard.ids_are_keys:
            keys = np.asarray(shard.keys[places], dtype=np.int64)[plain]
            valid &= (keys >= 0) & (heads["id"] == keys.astype(np.uint64))
        for part in parts:
            valid &= (part >= 0) & (part == np.floor(part)) & (part < FLOAT32_EXACT)
        stored = np.zeros(np.count_nonzero(valid), dtype=np.int64)
        for part in parts:
            stored = stored * FLOAT32_EXACT + part[valid].astype(np.int64)
        inside = stored < (np.iinfo(np.int64).max if self.told_classes is None else self.told_classes)
        labels[plain[valid][inside]] = stored[inside]
        for image in np.flatnonzero(labels < 0):
            position = shard.first + first + int(image)
            with suppress(DamagedRecord):
                labels[image] = self.decode(shard.read_image(position), shard, position)
        return labels


def cache_place(path: Path, name: str) -> Path:
    """The cache file of the data set at ``path``: in its folder, or next to its ``.rec``."""
    return path / f"{name}.cache" if path.is_dir() else path.with_suffix(f".{name}.cache")
