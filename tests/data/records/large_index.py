"""How fast 42 million records open, and what they cost: figures for docs/data.md.

    python -m tests.data.records.large_index DIRECTORY

Makes a sparse ``.rec`` (it takes no room on the disk) and its ``.idx`` (0.9 GB) in DIRECTORY, and opens them in
processes of their own: the first time, and then from the cache, beside another process that has them open.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pfc.data.records.recordio import MAGIC

RECORDS = 42_000_000
RECORD_BYTES = 7168

OPEN = """
import sys, time
from pfc.data import RecordDataset

def memory():
    sizes = {}
    for line in open("/proc/self/smaps_rollup").read().splitlines()[1:]:
        name, size = line.split(":")
        sizes[name] = int(size.split()[0]) / 1024
    return sizes

before, start = memory(), time.perf_counter()
ds = RecordDataset.open(sys.argv[1])
seconds, after = time.perf_counter() - start, memory()
own = after["Anonymous"] - before["Anonymous"]
print(f"{len(ds):,} records in {seconds:.2f} s, {own:.1f} MiB of memory of its own", flush=True)
sys.stdin.read()
"""


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.rec").open("wb") as file:
        file.truncate(RECORDS * RECORD_BYTES)
        for key in np.unique(np.linspace(0, RECORDS - 1, 16).astype(np.int64)).tolist():  # those that opening looks at
            file.seek(key * RECORD_BYTES)
            file.write(struct.pack("<IIIfQQ", MAGIC, RECORD_BYTES - 8, 0, 1.0, key, 0))
    with (folder / "train.idx").open("w", encoding="ascii") as file:
        for first in range(0, RECORDS, 1_000_000):
            keys = range(first, min(first + 1_000_000, RECORDS))
            file.write("".join(f"{key}\t{key * RECORD_BYTES}\n" for key in keys))
    time.sleep(3)  # a file that has just been written is not cached


def main(folder: Path) -> None:
    if not (folder / "train.idx").exists():
        write(folder)
    cache = folder / "train.idx.2.cache"
    cache.unlink(missing_ok=True)
    opened: list[subprocess.Popen[str]] = []
    for what in ("first opening", "from the cache", "beside it"):
        process = subprocess.Popen([sys.executable, "-c", OPEN, folder], stdin=-1, stdout=-1, text=True)
        assert process.stdout is not None
        print(f"{what}: {process.stdout.readline().strip()}")
        opened.append(process)
    for process in opened:
        process.communicate()
    print(f"{cache.stat().st_size / RECORDS:.2f} bytes a record in {cache.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
