"""One index over all shards, for readers that take several ``.rec`` files but only one ``.idx``, as DALI's does.

Such a reader treats the ``.rec`` files as one file, concatenated in the given order. So the merged index numbers all
images from 0, and adds to each offset the sizes of the shards before it. The benchmark of loading compares pfc with
DALI's reader ``fn.readers.mxnet`` through it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..atomic import replacing
from ..records.dataset import RecordDataset


def write_merged_index(dataset: RecordDataset, path: str | Path) -> list[Path]:
    """Write ``path``: a line ``number<tab>offset`` for each image, its offset in the concatenated shards.

    Header and identity records are left out, since DALI's reader would stop at them. Returns the shards' ``.rec`` files
    in the order that the offsets assume: ``fn.readers.mxnet(path=[...], index_path=[path])``.
    """
    path = Path(path)
    base, number = 0, 0
    with replacing(path) as unfinished, unfinished.open("w", encoding="ascii") as file:
        for shard in dataset.shards:
            offsets = np.asarray(shard.offsets[shard.first : shard.first + shard.images], dtype=np.int64) + base
            for first in range(0, len(offsets), 1 << 16):
                part = offsets[first : first + (1 << 16)].tolist()
                file.writelines(f"{number + place}\t{offset}\n" for place, offset in enumerate(part))
                number += len(part)
            base += shard.file.size
    return [shard.file.path for shard in dataset.shards]
