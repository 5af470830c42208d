"""What a plain record is, and finding plain records in a shard.

A plain record, as nearly all are, is in one piece (cflag 0) and has a single label (flag 0; flag 2 if the data set
stores labels as two numbers). So its fields have fixed places, ``PLAIN``, and code that handles many records at once
reads them there: ``find_plain`` in numpy, ``loading/plain.c`` in C. Such code leaves all other records to
``RecordFile.read``, and also plain ones whose label or id is not valid: reading names the damage.
"""

from __future__ import annotations

import numpy as np

from .recordio import MAGIC, RecordFile

PLAIN = np.dtype(
    [("magic", "<u4"), ("length", "<u4"), ("flag", "<u4"), ("label", "<f4"), ("id", "<u8"), ("id2", "<u8")]
)
PLAIN_TWO = np.dtype([*PLAIN.descr, ("labels", "<f4", 2)])
"""The first bytes of a plain record, with one label or two; the upper three bits of ``length`` are the cflag."""


def find_plain(file: RecordFile, offsets: np.ndarray, layout: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The plain records among those at ``offsets``, int64 [n]: their places in ``offsets``, int64 [p], and their first
    bytes, ``layout`` [p], which is ``PLAIN`` or ``PLAIN_TWO``."""
    words = file.bytes[: file.size // 4 * 4].view("<u4")
    inside = np.flatnonzero((offsets % 4 == 0) & (offsets >= 0) & (offsets <= file.size - layout.itemsize))
    at = offsets[inside] // 4
    with file.reading():
        file.bring(offsets[inside], offsets[inside] + layout.itemsize)
        heads = words[at[:, None] + np.arange(layout.itemsize // 4)].view(layout)[:, 0]
    plain = (heads["magic"] == MAGIC) & (heads["length"] >> 29 == 0)
    plain &= heads["length"] >= layout.itemsize - 8  # which does not count magic and length
    plain &= heads["flag"] == (2 if layout == PLAIN_TWO else 0)
    return inside[plain], heads[plain]
