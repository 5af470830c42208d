"""Identities as small numbers: from label numbers, and from names in the order in which they come."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import UsageError
from .base import Numbers

MOST_LABELS = 1 << 48  # what two float32 numbers can hold exactly


def whole_number(text: bytes | str) -> int | None:
    """A label from 0 to 2⁴⁸ − 1, written as 7, 7.0 or 7.000000 (as im2rec does); None for anything else."""
    if (b"_" in text) if isinstance(text, bytes) else ("_" in text):  # Python's own 1_000
        return None
    try:
        number = int(text)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            return None
        if not value.is_integer():
            return None
        number = int(value)
    return number if 0 <= number < MOST_LABELS else None


def codes_of(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels that occur, int64 [K] ascending, and int32 [N], where each of ``labels`` (int64 [N]) stands there.

    A negative label stands for no identity, and its code is −1.
    """
    top = int(labels.max(initial=-1))
    if top < max(1 << 20, 4 * len(labels)):  # a table costs less than sorting
        table = np.zeros(top + 2, dtype=bool)
        table[labels] = True  # −1 marks the last place
        table[-1] = False
        codes = np.cumsum(table, dtype=np.int32) - 1
        codes[-1] = -1
        return np.flatnonzero(table), codes[labels]
    numbers, codes = np.unique(labels, return_inverse=True)
    negative = int(np.searchsorted(numbers, 0))
    return numbers[negative:], np.maximum(codes.astype(np.int32) - negative, -1)


def names_of(numbers: np.ndarray, known: list[str] | None) -> Sequence[str]:
    """The names of label numbers, int64 [K] ascending: those of ``known`` where it names them all, else the numbers."""
    if known is None or (len(numbers) and len(known) <= numbers[-1]):
        return Numbers(numbers)
    return [known[number] for number in numbers.tolist()]


def label_text(where: str, label: Any) -> str:
    """The label of a table's row as text: a number as 7, whether it is an integer or a float.

    UsageError if it is missing (null, empty, NaN), or a number that is negative or not whole.
    """
    if label is None or label == "" or label != label:
        raise UsageError(f"{where} has no label")
    if not isinstance(label, int | float):
        return str(label)
    if label < 0 or not float(label).is_integer():
        what = "is not a whole number from 0 on: leave such rows out, or give all labels as text"
        raise UsageError(f"{where}: label {label} {what}")
    return str(int(label))


class NameCodes:
    """Gives each new name the next code; ``finish`` sorts them."""

    def __init__(self) -> None:
        self._code: dict[str, int] = {}
        self._codes = array("i")

    def append(self, name: str) -> None:
        self._codes.append(self._code.setdefault(name, len(self._code)))

    def code(self, name: str) -> int:
        return self._code.setdefault(name, len(self._code))

    def finish(self, known: list[str] | None = None) -> tuple[Sequence[str], np.ndarray | None, np.ndarray, np.ndarray]:
        """Names [K] in order; their numbers (int64 [K]) where all are numbers; codes int32 [N]; rank int32 [K].

        Numbers are ordered as numbers, else names as texts. rank is the final code of each code given.
        known: the names that numbers stand for, see ``names_of``.
        """
        given = list(self._code)
        values = [whole_number(name) if name.isdecimal() and str(int(name)) == name else None for name in given]
        if all(value is not None for value in values):
            numbers = np.array(values, dtype=np.int64)
            order = np.argsort(numbers)
            sorted_numbers: np.ndarray | None = numbers[order]
            names = names_of(sorted_numbers, known)
        else:
            order = np.array(sorted(range(len(given)), key=given.__getitem__), dtype=np.int64)
            names, sorted_numbers = [given[i] for i in order], None
        rank = np.empty(len(given), dtype=np.int32)
        rank[order] = np.arange(len(given), dtype=np.int32)
        codes = rank[np.frombuffer(self._codes, dtype=np.int32)] if self._codes else np.zeros(0, dtype=np.int32)
        return names, sorted_numbers, codes, rank
