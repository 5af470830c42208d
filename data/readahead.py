"""Asks the operating system for the blocks of the next window before they are needed, so that a disk reads in rows."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from .mixture import MixedOrder
from .order import BlockOrder, Order
from .slices import Dataset

_LAST = 1 << 16  # bytes asked for behind the start of a block's last record


class ReadAhead:
    """Keeps the page cache one window ahead of the position, for the block orders that ``order`` consists of."""

    def __init__(self, dataset: Dataset, order: Order) -> None:
        self._dataset = dataset
        self._mixed = order if isinstance(order, MixedOrder) else None
        parts = self._mixed.orders if self._mixed else [order]
        starts = self._mixed.starts if self._mixed else [0]
        self._parts = [
            (which, part, int(start))
            for which, (part, start) in enumerate(zip(parts, starts, strict=False))
            if isinstance(part, BlockOrder)
        ]
        self._asked = dict.fromkeys((which for which, _, _ in self._parts), -1)  # windows, counted over all epochs
        self._thread = ThreadPoolExecutor(1) if self._parts and hasattr(os, "posix_fadvise") else None

    def move(self, position: int) -> None:
        """Asks for what follows ``position``; returns at once."""
        if self._thread is None:
            return
        standing = dict(self._mixed.own(position)) if self._mixed else {0: position}
        for which, order, first in self._parts:
            here = order.window_start(standing[which])
            after = order.window_start(here + order.window)
            for start in (here, after):
                if start > self._asked[which]:
                    self._asked[which] = start
                    self._thread.submit(self._ask, order, start, first)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _ask(self, order: BlockOrder, window_start: int, first: int) -> None:
        for start, stop in order.runs(window_start):
            while start < stop:
                shard, position = self._dataset.locate(first + start)
                count = min(stop - start, shard.first + shard.images - position)
                offsets = shard.offsets[position : position + count]
                low, high = int(offsets.min()), int(offsets.max()) + _LAST
                descriptor = os.open(shard.file.path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, low, high - low, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)
                start += count
