"""im2rec's list file: lines ``index TAB label [TAB more labels] TAB path``."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import numpy as np

from ...errors import UsageError
from ...records.manifest import printable
from .base import FileSource, Numbers, Texts
from .codes import codes_of, whole_number


class ListSource(FileSource):
    """The images of the list file ``path``, whose paths are relative to ``root``.

    Of several labels the first is the class. UsageError, with the line, where the file is no such list: a
    missing column, an index or a label that is no whole number, an index twice, a path that leaves ``root``.
    """

    def __init__(self, path: Path, root: Path) -> None:
        super().__init__(root, Texts())
        self.about = printable(f"list {path.resolve()}")
        check_root(root)
        labels, indices, lines = array("q"), array("q"), array("q")
        inside = Inside(root)
        try:
            file = path.open("rb")
        except OSError as error:
            raise UsageError(f"{path}: {(error.strerror or '').lower()}; check the path") from None
        with file:
            for number, line in enumerate(file, start=1):
                fields = line.strip(b"\r\n").split(b"\t")
                if fields == [b""]:
                    continue
                if len(fields) < 3:
                    what = f"has {len(fields)} column(s) where index, label and path (with tabs between) are wanted"
                    raise UsageError(f"{path}: line {number} {what}")
                index = whole_number(fields[0])
                if index is None:
                    raise _no_number(path, number, "index", fields[0])
                label = whole_number(fields[1])
                if label is None:
                    raise _no_number(path, number, "label", fields[1])
                if not fields[-1]:
                    raise UsageError(f"{path}: line {number} has no path")
                name = inside(fields[-1])
                if name is None:
                    raise UsageError(f"{path}: line {number}: {_shown(fields[-1])} lies outside of the root {root}")
                indices.append(index)
                labels.append(label)
                lines.append(number)
                self.paths.append(name)
        if not labels:
            raise UsageError(f"{path} lists no image: it is empty")
        _check_unique(path, np.frombuffer(indices, dtype=np.int64), np.frombuffer(lines, dtype=np.int64))
        self.numbers, self.codes = codes_of(np.frombuffer(labels, dtype=np.int64))
        self.names = Numbers(self.numbers)


def check_root(root: Path) -> None:
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder; give the one that the paths are relative to (--root)")


class Inside:
    """Whether a path stays under ``root``, and what it is relative to it; links are not looked through."""

    def __init__(self, root: Path) -> None:
        self.root = os.fsencode(os.path.abspath(root))

    def __call__(self, path: bytes) -> bytes | None:
        if not path.startswith(b"/") and b".." not in path:  # as nearly always
            return path
        whole = os.path.normpath(os.path.join(self.root, path))
        under = os.path.join(self.root, b"")
        return whole[len(under) :] if whole.startswith(under) else None


def _check_unique(path: Path, indices: np.ndarray, lines: np.ndarray) -> None:
    order = np.argsort(indices, kind="stable")
    again = np.flatnonzero(np.diff(indices[order]) == 0)
    if len(again):
        first, second = lines[order[again[0]]], lines[order[again[0] + 1]]
        raise UsageError(f"{path}: index {indices[order[again[0]]]} stands in line {first} and again in line {second}")


def _no_number(path: Path, line: int, column: str, text: bytes) -> UsageError:
    return UsageError(f"{path}: line {line}: {column} {_shown(text)!r} is not a whole number from 0 on")


def _shown(text: bytes) -> str:
    return printable(os.fsdecode(text[:100]))
