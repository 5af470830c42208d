"""Which images and identities of a source are packed, and under which labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UsageError
from .options import PackOptions
from .sources.base import LazyTexts, Numbers, Source, some


@dataclass(frozen=True)
class Selection:
    """The choice: ``images`` int32 [n], places in the source; ``labels`` int64 [K], −1 for identities left out."""

    images: np.ndarray
    labels: np.ndarray
    identities: int
    names: Sequence[str] | None  # of all labels; None where labels are the source's numbers
    dropped_identities: int
    dropped_images: int


def select(source: Source, options: PackOptions) -> Selection:
    """The images of ``source`` that ``options`` choose, and their labels; UsageError if there are none."""
    if options.min_images < 1:
        raise UsageError(f"min_images {options.min_images}: an identity has at least 1")
    there = source.codes >= 0
    if options.without_images is not None:
        there[_numbered(len(there), Path(options.without_images))] = False
    had_images = np.bincount(source.codes[source.codes >= 0], minlength=len(source.names))
    counts = np.bincount(source.codes[there], minlength=len(source.names))
    kept = counts >= options.min_images
    if options.only is not None:
        kept &= _named(source.names, Path(options.only))
    if options.without is not None:
        kept &= ~_named(source.names, Path(options.without))
    if not kept.any():
        left = f"with {options.min_images} image(s) or more, and not filtered out by name" if len(counts) else "at all"
        raise UsageError(f"{source.about}: no identity {left}: there is nothing to pack")

    labels = np.full(len(counts), -1, dtype=np.int64)
    if not options.keep_labels:
        identities = int(kept.sum())
        labels[kept] = np.arange(identities)
        names: Sequence[str] | None = source.names if identities == len(counts) else _Picked(source.names, kept)
    elif source.numbers is None:
        raise UsageError(f"{source.about}: its labels cannot be kept, since they are no numbers in one label space")
    else:
        labels[kept] = source.numbers[kept]
        identities = max(int(labels.max()) + 1, source.told or 0)
        names = None
        if not isinstance(source.names, Numbers):
            names = [""] * identities
            for code in np.flatnonzero(kept).tolist():
                names[labels[code]] = source.names[code]
    images = np.flatnonzero(there & kept[source.codes]).astype(np.int32)
    return Selection(
        images=images,
        labels=labels,
        identities=identities,
        names=names,
        dropped_identities=int(((had_images > 0) & ~kept).sum()),
        dropped_images=int(had_images.sum()) - len(images),
    )


def _named(names: Sequence[str], path: Path) -> np.ndarray:
    """Which of ``names`` the file lists; any other line is an error, since it must be a mistake."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or '').lower()}; give a text file with a name a line") from None
    listed = {line.rstrip("\r") for line in lines} - {""}
    found = np.fromiter((name in listed for name in names), dtype=bool, count=len(names))
    if found.sum() < len(listed):
        unknown = sorted(listed.difference(names))
        raise UsageError(f"{path} names {len(unknown)} identities that the source does not have: {some(unknown)}")
    return found


def _numbered(images: int, path: Path) -> np.ndarray:
    """The images whose numbers the file lists, int64 [n]; a line that is none of them is an error."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split()
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or '').lower()}; give a text file with a number a line") from None
    wrong = [line for line in lines if not line.isascii() or not line.isdigit() or int(line) >= images]
    if wrong:
        raise UsageError(
            f"{path} has {len(wrong)} line(s) that are no number of an image, 0 to {images - 1}: {some(sorted(wrong))}"
        )
    return np.array([int(line) for line in lines], dtype=np.int64)


class _Picked(LazyTexts):
    """Some of many names, without a copy."""

    def __init__(self, names: Sequence[str], kept: np.ndarray) -> None:
        self._names = names
        self._places = np.flatnonzero(kept)

    def __len__(self) -> int:
        return len(self._places)

    def text(self, place: int) -> str:
        return self._names[int(self._places[place])]
