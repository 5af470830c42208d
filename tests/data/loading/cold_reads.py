"""What training reads from a cold disk, and how fast: figures for docs/data.md.

    python -m tests.data.loading.cold_reads DATASET [global|blocks] [BATCHES]

Drops DATASET from the page cache, then loads batches of 128 as training does. The first ten, which also fetch what is
read ahead, are not counted.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pfc.data import RecordDataset, TrainLoader
from pfc.data.order.orders import BlockOrder

BATCH, FIRST = 128, 10


def drop(folder: Path) -> None:
    """The data set's files out of the page cache; whatever is mapped stays there."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_from_disk() -> int:
    """Bytes that this process has had read from disks."""
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


def main(folder: Path, name: str = "global", batches: str = "20") -> None:
    drop(folder)
    dataset = RecordDataset.open(folder)
    assert dataset.image_size is not None
    print(f"opened: {read_from_disk() / 1e6:.1f} MB read")
    order = BlockOrder(len(dataset), 0, block_size=1024, window=8192) if name == "blocks" else None
    loader = TrainLoader(dataset, batch_size=BATCH, image_size=dataset.image_size, order=order)
    for _ in range(FIRST):
        next(loader)
    before, start = read_from_disk(), time.perf_counter()
    for _ in range(int(batches)):
        next(loader)
    seconds, read = time.perf_counter() - start, read_from_disk() - before
    loader.close()
    images = int(batches) * BATCH
    stored = sum(shard.file.size for shard in dataset.shards) / len(dataset)
    print(
        f"{name}: {images:,} images of {stored / 1e3:.1f} kB in {seconds:.2f} s, {images / seconds:,.0f} images/s; "
        f"{read / 1e6:.1f} MB read, {read / images / 1e3:.1f} kB an image"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
