"""The images that a protocol names, read when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..alignment import need_alignment
from ..errors import UsageError
from ..images import reencode, why_unreadable
from ..records.dataset import RecordDataset
from ..records.manifest import printable

_RECORD = re.compile(r"(.+)#(\d{1,18})")  # SET#NUMBER


class WhenAsked(Sequence[Any]):
    """A sequence whose items are read when they are asked for; a slice of it is another."""

    def __init__(self, read: Callable[[int], Any], places: Sequence[int]) -> None:
        self.read, self.places = read, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: Any) -> Any:
        return WhenAsked(self.read, self.places[at]) if isinstance(at, slice) else self.read(self.places[at])


def open_images(
    names: Sequence[str],
    folder: Path,
    landmarks: NDArray[np.float32] | None = None,
    size: tuple[int, int] | None = None,
) -> WhenAsked:
    """The encoded images, bytes or uint8 arrays: files relative to ``folder``, or ``SET#NUMBER``.

    Args:
        landmarks: float32 [N, 5, 2], by which faces are aligned to ``size`` (height, width), as ``pfc pack table
            --align`` does; where they are NaN the image is given as it is.

    Raises:
        UsageError: an image does not exist; the first is named, all are counted. Faces are to be aligned and
            scikit-image is not installed; when it is read, an image that cannot be aligned.
    """
    if landmarks is not None:
        need_alignment()
    sets: dict[str, RecordDataset] = {}
    where: list[Path | tuple[RecordDataset, int]] = []
    missing = []
    for name in names:
        record = _RECORD.fullmatch(name)
        if record is not None and not _there(folder / name):
            if record[1] not in sets:
                sets[record[1]] = RecordDataset.open(folder / record[1])
            dataset, number = sets[record[1]], int(record[2])
            if number >= len(dataset):
                missing.append(name)
            where.append((dataset, number))
        else:
            path = folder / name
            if not _there(path):
                missing.append(name)
            where.append(path)
    if missing:
        raise UsageError(
            f"{folder}: {len(missing):,} of {len(names):,} images are not there, the first is {printable(missing[0])}: "
            "give the folder that the names are relative to with --root"
        )

    def read(place: int) -> bytes | np.ndarray:
        at = where[place]
        try:
            encoded = at.read_bytes() if isinstance(at, Path) else at[0].read(at[1])[1]
        except OSError as error:
            raise UsageError(f"{printable(names[place])}: {(error.strerror or str(error)).lower()}") from None
        if landmarks is None or size is None or np.isnan(landmarks[place, 0, 0]):
            return encoded
        try:
            return reencode(bytes(encoded), size=size, quality=95, encoding="png", landmarks=landmarks[place])
        except Exception as error:  # Pillow's decoders raise nearly anything about a damaged file
            raise UsageError(f"{printable(names[place])} cannot be aligned: {why_unreadable(error)}") from None

    return WhenAsked(read, range(len(names)))


def _there(path: Path) -> bool:
    """Also where the name is too long to be any file's."""
    try:
        return path.is_file()
    except OSError:
        return False
