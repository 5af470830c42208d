"""Tables of the user's: CSV or TSV with a header line, or Parquet, read row by row."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import UsageError

_BUFFER = 1 << 20  # bytes of a Parquet file that are read at once; without, whole columns of its row groups are
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def columns_of(path: Path) -> list[str]:
    """The names of the table's columns; UsageError where it is none."""
    kind = path.suffix.lower()
    if not path.exists():
        raise UsageError(f"{path}: no such table; check the path")
    if path.is_dir() or kind == ".parquet":
        return _checked(path, list(open_parquet(find_parquet(path)[0]).schema_arrow.names))
    if kind not in _DELIMITERS:
        raise UsageError(f"{path}: a table ends in .csv, .tsv or .parquet, or is a folder of .parquet files")
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UsageError(f"{path} is UTF-16: save it as UTF-8")
    with _open_csv(path) as file:
        try:
            return _checked(path, next(csv.reader(file, delimiter=_DELIMITERS[kind]), []))
        except csv.Error as error:
            raise UsageError(f"{path}: line 1: {error}") from None


def rows_of(path: Path, *columns: str) -> Iterator[tuple[Any, ...]]:
    """(where, a value of each column) of every row; of CSV and TSV the values are texts.

    Raises:
        UsageError: a column is missing, or a line has another number of columns than the header.
    """
    delimiter = _DELIMITERS.get(path.suffix.lower())
    if delimiter is None:
        yield from read_columns(find_parquet(path), *columns)
        return
    with _open_csv(path) as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = next(reader)
            places = [header.index(column) for column in columns]
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise UsageError(
                        f"{path}: line {reader.line_num} has {len(row)} columns, the header line has {len(header)}"
                    )
                yield f"{path}: line {reader.line_num}", *[row[place] for place in places]
        except csv.Error as error:
            raise UsageError(f"{path}: line {reader.line_num}: {error}") from None


def find_parquet(path: Path) -> list[Path]:
    """The file, or all .parquet files under the folder by their names."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{path} holds no .parquet file; give a table, or a folder of .parquet files")
    return files


def open_parquet(path: Path) -> Any:
    """pyarrow's ParquetFile; UsageError where pyarrow is missing or the file is not Parquet."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(f"{path}: Parquet needs one more package: pip install 'pfc[parquet]'") from None
    try:
        return parquet.ParquetFile(path, buffer_size=_BUFFER)
    except (ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from None


def read_columns(files: list[Path], *columns: str) -> Iterator[tuple[Any, ...]]:
    """(where, a value of each column) of every row."""
    for file in files:
        table = open_parquet(file)
        missing = [column for column in columns if column not in table.schema_arrow.names]
        if missing:
            raise UsageError(f"{file} has no column {missing[0]}, unlike {files[0].name}")
        row = 0
        for batch in _batches(file, table, columns):
            for values in zip(*(batch.column(column).to_pylist() for column in columns), strict=True):
                yield f"{file}: row {row}", *values
                row += 1


def write_csv(path: Path, titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table with a line of titles; names of any bytes stay what they are."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(titles)
        writer.writerows(rows)


def _batches(file: Path, table: Any, columns: tuple[str, ...]) -> Iterator[Any]:
    from pyarrow import ArrowException

    batches = table.iter_batches(columns=list(columns))
    while True:
        try:
            batch = next(batches, None)
        except (ArrowException, OSError) as error:
            raise UsageError(f"{file} is damaged: {' '.join(str(error).split())}") from None
        if batch is None:
            return
        yield batch


def _checked(path: Path, columns: list[str]) -> list[str]:
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice:
        raise UsageError(f"{path} has two columns {twice}: rename one")
    return columns


def _open_csv(path: Path) -> Any:
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
