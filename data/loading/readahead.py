"""Asks for the next window before it is needed: a disk then reads in rows, and remote files come in time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from ..errors import UsageError
from ..order.orders import Order, Window
from ..records.joint import JointDataset
from ..remote.mirror import RemoteRecordFile
from .reader import Dataset

_LAST = 1 << 16  # bytes asked for behind the start of a block's last record
_SPARE = 1.5  # a cache holds that many times what is read in a while, so that nothing goes which is still to be read


class ReadAhead:
    """Keeps the page cache, or of remote files the cache on the disk, one window ahead of the position.

    Where ``order`` has no windows, remote files are fetched as a whole, in the background.

    Raises:
        UsageError: the cache is too small for that.
    """

    def __init__(self, dataset: Dataset, order: Order, position: int = 0) -> None:
        self._dataset, self._order = dataset, order
        self._asked: list[Window] = []
        self._thread = ThreadPoolExecutor(1)
        sets = dataset.sets if isinstance(dataset, JointDataset) else [dataset]
        files = [shard.file for one in sets for shard in one.shards]
        remote = [file for file in files if isinstance(file, RemoteRecordFile)]
        if remote:
            windows = order.upcoming(position)
            total = sum(file.size for file in remote)
            mean = sum(file.size for file in files) / len(dataset)
            images = sum(stop - start for window in windows for start, stop in window.runs())
            wanted = min(total, _SPARE * images * mean) if windows else total
            if wanted > (limit := remote[0].cache.limit):
                raise UsageError(
                    f"data.cache.gigabytes: {limit / 1e9:.3g} are too few for what is read at a time, "
                    f"{wanted / 1e9:.3g}: "
                    + ("raise it, or take a smaller data.order.window" if windows else _NO_WINDOWS)
                )
            if not windows:
                for file in remote:
                    file.will_need(0, file.size)

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


_NO_WINDOWS = "raise it, or choose data.order: blocks, which reads a part of the data set at a time"
