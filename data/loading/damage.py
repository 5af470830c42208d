"""Damaged images met while loading: how many are too many."""

from __future__ import annotations

from collections import deque

from ..errors import DamagedRecord, UsageError

WINDOW = 10_000
"""Images over which the share of damaged ones is judged."""


class DamageLimit:
    """Ends a run when too large a share of its images is damaged.

    Args:
        share: largest share of damaged images: more than share · ``WINDOW`` among the last ``WINDOW`` images of a rank
            end the run. So a few at the beginning are no reason yet.
        name: of the data set, for the message.
    """

    def __init__(self, share: float, name: str) -> None:
        self._share = share
        self._name = name
        self._batches: deque[tuple[int, int]] = deque()
        self._images = self._damaged = 0

    def count(self, images: int, damaged: list[DamagedRecord]) -> None:
        """Counts a batch of ``images``; UsageError where its ``damaged`` ones are too many."""
        self._batches.append((images, len(damaged)))
        self._images += images
        self._damaged += len(damaged)
        while self._images - self._batches[0][0] >= WINDOW:
            gone = self._batches.popleft()
            self._images -= gone[0]
            self._damaged -= gone[1]
        if damaged and self._damaged > self._share * WINDOW:
            raise too_many(self._name, f"{self._damaged:,} of the last {self._images:,} images of a rank", damaged[-1])


def too_many(name: str, what: str, last: DamagedRecord) -> UsageError:
    """The error that ends the run."""
    return UsageError(
        f"data set {name!r}: {what} are damaged, more than data.max_damaged allows, the last one {last}; make a clean "
        "copy with `pfc inspect DATASET --repair OUT`, or allow more"
    )
