"""Asks for the next window before it is needed: a disk then reads in rows, and remote files come in time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from ..errors import UsageError
from ..order.mixed import PartedOrder
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
        self._share = not isinstance(order, PartedOrder)  # else the ranks of this machine may read other parts
        self._asked: list[Window] = []
        self._thread = ThreadPoolExecutor(1)
        self._remote = remote_files(dataset)
        need_room(dataset, order.upcoming(position))
        if not order.upcoming(position):
            for file in self._remote:
                self._thread.submit(file.will_need, 0, file.size)

    def move(self, position: int) -> None:
        """Asks for what follows ``position``; returns at once."""
        windows = self._order.upcoming(position)
        for window in windows:
            if window not in self._asked:
                self._thread.submit(self._ask, window)
        self._asked = windows

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        for cache in {file.cache for file in self._remote}:
            cache.forget_ahead()

    def _ask(self, window: Window) -> None:
        for start, stop in window.runs():
            while start < stop:
                shard, position = self._dataset.locate(start)
                count = min(stop - start, shard.first + shard.images - position)
                offsets = shard.offsets[position : position + count]
                if isinstance(shard.file, RemoteRecordFile):
                    shard.file.will_need(offsets, offsets + _LAST, share=self._share)
                else:
                    shard.file.will_need(int(offsets.min()), int(offsets.max()) + _LAST)
                start += count


def remote_files(dataset: Dataset) -> list[RemoteRecordFile]:
    """The shards that are not on this machine's disks."""
    sets = dataset.sets if isinstance(dataset, JointDataset) else [dataset]
    files = [shard.file for one in sets for shard in one.shards]
    return [file for file in files if isinstance(file, RemoteRecordFile)]


def need_room(dataset: Dataset, windows: list[Window]) -> None:
    """UsageError where the cache of remote files does not hold these windows, or, without any, all of them."""
    remote = remote_files(dataset)
    if not remote:
        return
    total = sum(file.size for file in remote)
    images = sum(stop - start for window in windows for start, stop in window.runs())
    wanted = min(total, _SPARE * images * total / len(dataset)) if windows else total
    if wanted > (limit := remote[0].cache.limit):
        advice = "raise it, or take a smaller data.order.window" if windows else _NO_WINDOWS
        raise UsageError(
            f"data.cache.gigabytes: {limit / 1e9:.3g} are too few for what is read at a time, {wanted / 1e9:.3g}: "
            f"{advice}"
        )


_NO_WINDOWS = "raise it, or choose data.order: blocks, which reads a part of the data set at a time"
