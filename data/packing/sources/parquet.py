"""Images that lie in a column of Parquet files."""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ...alignment import Landmarks
from ...errors import UsageError
from ...records.manifest import printable
from ...tables import open_parquet, read_columns
from ..storing import Storing
from .base import Reader, Source
from .codes import NameCodes, label_text

_ROWS = 256  # rows with images that are read at once
_READ_AHEAD = 1 << 26  # bytes of them, about


def holds_images(kind: Any) -> bool:
    """Whether a column of this type holds the images' bytes, not their paths."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def label_names(schema: Any, column: str) -> list[str] | None:
    """The names of label numbers, which Hugging Face's data sets store in the schema."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        names = about["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


class EmbeddedSource(Source):
    """Images that lie in the column ``images`` of Parquet files.

    Rows of Parquet cannot be read one by one, so ``prepare`` copies the images into one temporary file, from which
    they are then read in any order. ``known``: names of label numbers.
    """

    def __init__(self, path: Path, files: list[Path], images: str, label_column: str, known: list[str] | None) -> None:
        self.about = printable(f"table {path.resolve()}")
        self._files = files
        self._column = images
        labels = NameCodes()
        counts = [0] * len(files)
        for number, file in enumerate(files):
            for where, label in read_columns([file], label_column):
                labels.append(label_text(where, label))
                counts[number] += 1
        self._starts = [0, *accumulate(counts)]
        if not self._starts[-1]:
            raise UsageError(f"{path} lists no image: it is empty")
        self.names, self.numbers, self.codes, _ = labels.finish(known)
        self._spool = Path()
        self._ends = np.zeros(0, dtype=np.int64)

    def prepare(self, folder: Path) -> None:
        self._spool, ends = folder / "images", folder / "ends.npy"
        if not ends.exists():
            place, places = 0, array("q")
            with self._spool.open("wb") as spool:
                for data in self._images():
                    place += spool.write(data or b"")
                    places.append(place)
                spool.flush()
                os.fsync(spool.fileno())
            with (folder / "ends.new").open("wb") as file:
                np.save(file, np.frombuffer(places, dtype=np.int64))
                file.flush()
                os.fsync(file.fileno())
            (folder / "ends.new").replace(ends)
        self._ends = np.load(ends)

    def _images(self) -> Iterator[bytes | None]:
        for file in self._files:
            table = open_parquet(file)
            for number in range(table.num_row_groups):
                group = table.metadata.row_group(number)
                rows = min(_ROWS, max(1, _READ_AHEAD * group.num_rows // max(1, group.total_byte_size)))
                for batch in table.iter_batches(rows, row_groups=[number], columns=[self._column]):
                    for value in batch.column(0):
                        value = value.as_py()
                        yield value["bytes"] if isinstance(value, dict) else value

    def reader(self, store: Storing, identities: int, *, shuffled: bool) -> Reader:
        return SpoolReader(self._spool, store)

    def task(self, image: int, label: int) -> tuple[int, int, Landmarks | None]:
        start = int(self._ends[image - 1]) if image else 0
        return start, int(self._ends[image]) - start, self.landmarks_of(image)

    def describe(self, image: int) -> str:
        at = bisect_right(self._starts, image) - 1
        return f"{self._files[at]}: row {image - self._starts[at]}"

    def content(self) -> Iterator[bytes]:
        yield from super().content()
        yield self._column.encode()
        for file in self._files:
            yield f"{file.resolve()} {file.stat().st_size}\0".encode("utf-8", "surrogateescape")


class SpoolReader:
    """Stores the image at (start, length) of a file, aligned where it has landmarks."""

    def __init__(self, spool: Path, store: Storing) -> None:
        self.spool = spool
        self.store = store

    def __call__(self, task: tuple[int, int, Landmarks | None]) -> bytes | str:
        start, length, landmarks = task
        if not length:  # null, or a struct with a path alone
            return "the table does not hold its bytes"
        spool = _open(self.spool, os.stat(self.spool).st_ino)
        return self.store(os.pread(spool.fileno(), length, start), landmarks)


@lru_cache(maxsize=1)
def _open(path: Path, inode: int) -> Any:
    """Once in each process; the inode keeps a later packing from reading an earlier one's file."""
    return path.open("rb")
