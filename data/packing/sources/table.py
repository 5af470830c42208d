"""A table of images: CSV or TSV with a header line, or Parquet; with paths, or with the images in a column."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...alignment import landmark_columns, need_alignment, parse_landmarks
from ...errors import UsageError
from ...records.manifest import printable
from ...tables import columns_of, find_parquet, open_parquet, rows_of
from .base import FileSource, Source, Texts
from .codes import NameCodes, label_text
from .listing import Inside, check_root
from .parquet import EmbeddedSource, holds_images, label_names

_PATHS = ("path", "image")  # columns that hold the image where none is named


def table_source(
    path: Path,
    *,
    root: Path | None = None,
    path_column: str | None = None,
    label_column: str = "label",
    align: bool = False,
) -> Source:
    """The images of the table ``path``: .csv, .tsv, .parquet, or a folder of .parquet files.

    path_column: has the images' paths, relative to ``root`` (default: the table's folder); in Parquet it may hold
    the images themselves, as bytes or as a struct with a field ``bytes``. None: ``path``, else ``image``.
    label_column: has the identity: a whole number or any text. align: align the faces by the table's landmarks; rows
    without are rejected. UsageError, with the row, where something is amiss.
    """
    columns = columns_of(path)
    path_column = _choose(path, columns, path_column, label_column)
    known = None
    if path.is_dir() or path.suffix.lower() == ".parquet":
        files = find_parquet(path)
        schema = open_parquet(files[0]).schema_arrow
        known = label_names(schema, label_column)
        if holds_images(schema.field(path_column).type):
            source: Source = EmbeddedSource(path, files, path_column, label_column, known)
            return _aligned(source, path, columns) if align else source
    rows = rows_of(path, path_column, label_column)
    if root is None:
        root = path if path.is_dir() else path.parent
    source = TableSource(path, root, rows, known)
    return _aligned(source, path, columns) if align else source


def _aligned(source: Source, path: Path, columns: list[str]) -> Source:
    """The source with the landmarks of its table; without the rows that have none."""
    need_alignment()
    names = landmark_columns(path, columns)
    if not names:
        raise UsageError(f"{path} has no columns x1, y1, ..., x5, y5: to align faces, find their five points first")
    numbers = array("f")
    for where, *values in rows_of(path, *names):
        numbers.extend(parse_landmarks(where, values))
    source.landmarks = np.frombuffer(numbers, dtype=np.float32).reshape(-1, 5, 2)
    without = np.isnan(source.landmarks[:, 0, 0])
    if without.all():
        raise UsageError(f"{path}: no row has landmarks (x1, y1, ..., x5, y5): there is no face to align")
    source.codes = np.where(without, -1, source.codes).astype(np.int32)
    source.rejected = [(source.describe(i), "it has no landmarks") for i in np.flatnonzero(without).tolist()]
    return source


class TableSource(FileSource):
    """The images of ``rows``: (where, path, label), paths relative to ``root``; ``known`` names of label numbers."""

    def __init__(self, path: Path, root: Path, rows: Iterator[tuple[str, Any, Any]], known: list[str] | None) -> None:
        super().__init__(root, Texts())
        self.about = printable(f"table {path.resolve()}")
        check_root(root)
        inside = Inside(root)
        labels = NameCodes()
        for where, name, label in rows:
            if not name:
                raise UsageError(f"{where} has no path")
            text = label_text(where, label)
            relative = inside(os.fsencode(name))
            if relative is None:
                raise UsageError(f"{where}: {printable(name)} lies outside of the root {root} (--root)")
            self.paths.append(relative)
            labels.append(text)
        if not len(self.paths):
            raise UsageError(f"{path} lists no image: it is empty")
        self.names, self.numbers, self.codes, _ = labels.finish(known)


def _choose(path: Path, columns: list[str], path_column: str | None, label_column: str) -> str:
    """The column with the images; UsageError where it or that with the labels is missing."""
    there = f"; there are: {', '.join(map(printable, columns))}"
    if path_column is None:
        path_column = next((name for name in _PATHS if name in columns), None)
        if path_column is None:
            raise UsageError(f"{path} has no column path or image: name the right one with --path-column{there}")
    elif path_column not in columns:
        raise UsageError(f"{path} has no column {path_column} (--path-column){there}")
    if label_column not in columns:
        raise UsageError(f"{path} has no column {label_column}: name the right one with --label-column{there}")
    return path_column
