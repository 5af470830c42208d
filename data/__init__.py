"""Data: from image files to the batches of a training run.

    records/    RecordIO shards, their index and labels; one data set, or several as one
    packing/    images into shards: from a folder, a list, a table, other RecordIO
    checking/   what a data set holds, what is wrong with it, and what can be saved of it
    order/      in which order training sees the images
    loading/    shards to batches of tensors: reading, decoding, augmenting
    remote/     data sets in an object store, on a web server or a slow disk
    pairs/      verification sets
    protocols/  evaluation protocols: one table for each, and their images
    glyphs/     data sets that any machine can make: printed characters, coloured patterns
    alignment   faces warped by five landmarks, for packing and for evaluation
    generated   a data set that is computed as it is read

The public names load on first use, so that a program pays only for what it touches.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checking.inspect import InspectReport, inspect_dataset
    from .checking.rebuild import rebuild_index
    from .errors import DamagedRecord, UsageError
    from .generated import GeneratedDataset, GeneratedLoader
    from .glyphs.glyphs import pack_glyphs
    from .glyphs.synthetic import pack_synthetic
    from .loading.batches import Batch, Loader
    from .loading.decoding import decode_images
    from .loading.loader import TrainLoader
    from .order.orders import SampleOrder
    from .packing.pack import pack_folder, pack_list, pack_recordio, pack_table, pack_webdataset
    from .packing.summary import PackSummary
    from .packing.writer import ShardedWriter
    from .pairs.pairs import Pairs, make_pairs, pairs_from_list, read_pairs, write_pairs
    from .records.dataset import RecordDataset
    from .records.joint import JointDataset
    from .remote.mirror import RemoteOptions

_HOME = {
    "checking.inspect": ("InspectReport", "inspect_dataset"),
    "checking.rebuild": ("rebuild_index",),
    "errors": ("DamagedRecord", "UsageError"),
    "generated": ("GeneratedDataset", "GeneratedLoader"),
    "glyphs.glyphs": ("pack_glyphs",),
    "glyphs.synthetic": ("pack_synthetic",),
    "loading.batches": ("Batch", "Loader"),
    "loading.decoding": ("decode_images",),
    "loading.loader": ("TrainLoader",),
    "order.orders": ("SampleOrder",),
    "packing.pack": ("pack_folder", "pack_list", "pack_recordio", "pack_table", "pack_webdataset"),
    "packing.summary": ("PackSummary",),
    "packing.writer": ("ShardedWriter",),
    "pairs.pairs": ("Pairs", "make_pairs", "pairs_from_list", "read_pairs", "write_pairs"),
    "records.dataset": ("RecordDataset",),
    "records.joint": ("JointDataset",),
    "remote.mirror": ("RemoteOptions",),
}
"""Module → the public names that it holds."""

__all__ = [
    "Batch",
    "DamagedRecord",
    "GeneratedDataset",
    "GeneratedLoader",
    "InspectReport",
    "JointDataset",
    "Loader",
    "PackSummary",
    "Pairs",
    "RecordDataset",
    "RemoteOptions",
    "SampleOrder",
    "ShardedWriter",
    "TrainLoader",
    "UsageError",
    "decode_images",
    "inspect_dataset",
    "make_pairs",
    "pack_folder",
    "pack_glyphs",
    "pack_list",
    "pack_recordio",
    "pack_synthetic",
    "pack_table",
    "pack_webdataset",
    "pairs_from_list",
    "read_pairs",
    "rebuild_index",
    "write_pairs",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
