"""One index over all shards, for readers that take several ``.rec`` files and one ``.idx``: DALI's own is such."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .dataset import RecordDataset

MERGED_NAME = "merged.idx"


def write_merged_index(dataset: RecordDataset, path: str | Path) -> list[Path]:
    """Write ``path``: a line ``number<tab>offset`` for each image, offsets counted through all shards in turn.

    Header and identity records are left out, at which DALI's reader would end. Returns the shards' ``.rec`` files in
    the order that the offsets assume: ``fn.readers.mxnet(path=[...], index_path=[path])``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    base, number = 0, 0
    with temporary.open("w", encoding="ascii") as file:
        for shard in dataset.shards:
            offsets = np.asarray(shard.offsets[shard.first : shard.first + shard.images], dtype=np.int64) + base
            for first in range(0, len(offsets), 1 << 16):
                part = offsets[first : first + (1 << 16)].tolist()
                file.writelines(f"{number + place}\t{offset}\n" for place, offset in enumerate(part))
                number += len(part)
            base += shard.file.size
    temporary.replace(path)
    return [shard.file.path for shard in dataset.shards]
