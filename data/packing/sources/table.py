"""A table of images: CSV or TSV with a header line, or Parquet; with paths, or with the images in a column."""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...records.manifest import printable
from .base import FileSource, Source, Texts
from .codes import NameCodes, label_text
from .listing import Inside, check_root
from .parquet import EmbeddedSource, find_parquet, holds_images, label_names, open_parquet, read_columns

_PATHS = ("path", "image")  # columns that hold the image where none is named


def table_source(
    path: Path, *, root: Path | None = None, path_column: str | None = None, label_column: str = "label"
) -> Source:
    """The images of the table ``path``: .csv, .tsv, .parquet, or a folder of .parquet files.

    path_column: has the images' paths, relative to ``root`` (default: the table's folder); in Parquet it may hold
    the images themselves, as bytes or as a struct with a field ``bytes``. None: ``path``, else ``image``.
    label_column: has the identity: a whole number or any text. UsageError, with the row, where something is amiss.
    """
    kind = path.suffix.lower()
    if not path.exists():
        raise UsageError(f"{path}: no such table; check the path")
    if path.is_dir() or kind == ".parquet":
        files = find_parquet(path)
        schema = open_parquet(files[0]).schema_arrow
        path_column = _choose(path, schema.names, path_column, label_column)
        known = label_names(schema, label_column)
        if holds_images(schema.field(path_column).type):
            return EmbeddedSource(path, files, path_column, label_column, known)
        rows = read_columns(files, path_column, label_column)
    elif kind in (".csv", ".tsv"):
        delimiter = "\t" if kind == ".tsv" else ","
        path_column = _choose(path, _header(path, delimiter), path_column, label_column)
        rows = _csv_rows(path, delimiter, path_column, label_column)
        known = None
    else:
        raise UsageError(f"{path}: a table ends in .csv, .tsv or .parquet, or is a folder of .parquet files")
    if root is None:
        root = path if path.is_dir() else path.parent
    return TableSource(path, root, rows, known)


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


def _open_csv(path: Path) -> Any:
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _header(path: Path, delimiter: str) -> list[str]:
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UsageError(f"{path} is UTF-16: save it as UTF-8")
    with _open_csv(path) as file:
        return next(csv.reader(file, delimiter=delimiter), [])


def _csv_rows(path: Path, delimiter: str, path_column: str, label_column: str) -> Iterator[tuple[str, str, str]]:
    with _open_csv(path) as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = next(reader)
            at_path, at_label = header.index(path_column), header.index(label_column)
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise UsageError(
                        f"{path}: line {reader.line_num} has {len(row)} columns, the header line has {len(header)}"
                    )
                yield f"{path}: line {reader.line_num}", row[at_path], row[at_label]
        except csv.Error as error:
            raise UsageError(f"{path}: line {reader.line_num}: {error}") from None
