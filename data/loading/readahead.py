"""Asks the operating system for the blocks of the next window before they are needed, so that a disk reads in rows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from ..order.orders import Order, Window
from .reader import Dataset

_LAST = 1 << 16  # bytes asked for behind the start of a block's last record


class ReadAhead:
    """Keeps the page cache one window ahead of the position, where ``order`` has windows."""

    def __init__(self, dataset: Dataset, order: Order) -> None:
        self._dataset, self._order = dataset, order
        self._asked: list[Window] = []
        self._thread = ThreadPoolExecutor(1)

    def move(self, position: int) -> None:
        """Asks for what follows ``position``; returns at once."""
        windows = self._order.upcoming(position)
        for window in windows:
            if window not in self._asked:
                self._thread.submit(self._ask, window)
        self._asked = windows

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _ask(self, window: Window) -> None:
        for start, stop in window.runs():
            while start < stop:
                shard, position = self._dataset.locate(start)
                count = min(stop - start, shard.first + shard.images - position)
                offsets = shard.offsets[position : position + count]
                shard.file.will_need(int(offsets.min()), int(offsets.max()) + _LAST)
                start += count
