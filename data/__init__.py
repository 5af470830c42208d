"""Data: RecordIO shards, packing, inspection, sample order, loading, verification pairs.

The names load on first use, so that a program pays only for what it touches.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import RecordDataset
    from .decoding import decode_images
    from .errors import DamagedRecord, UsageError
    from .glyphs import pack_glyphs
    from .inspect import InspectReport, inspect_dataset
    from .mixture import JointDataset
    from .order import SampleOrder
    from .packing import pack_folder, pack_list, pack_recordio, pack_table
    from .pairs import Pairs, make_pairs, pairs_from_list, read_pairs, write_pairs
    from .pipeline import Batch, TrainLoader
    from .rebuild import rebuild_index
    from .shards import ShardedWriter
    from .summary import PackSummary
    from .synthetic import pack_synthetic

_HOME = {
    "RecordDataset": "dataset",
    "DamagedRecord": "errors",
    "UsageError": "errors",
    "pack_glyphs": "glyphs",
    "InspectReport": "inspect",
    "JointDataset": "mixture",
    "inspect_dataset": "inspect",
    "SampleOrder": "order",
    "PackSummary": "summary",
    "pack_folder": "packing",
    "pack_list": "packing",
    "pack_recordio": "packing",
    "pack_table": "packing",
    "Pairs": "pairs",
    "make_pairs": "pairs",
    "pairs_from_list": "pairs",
    "read_pairs": "pairs",
    "write_pairs": "pairs",
    "Batch": "pipeline",
    "TrainLoader": "pipeline",
    "decode_images": "decoding",
    "rebuild_index": "rebuild",
    "ShardedWriter": "shards",
    "pack_synthetic": "synthetic",
}

__all__ = [
    "Batch",
    "DamagedRecord",
    "InspectReport",
    "JointDataset",
    "PackSummary",
    "Pairs",
    "RecordDataset",
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
    "pairs_from_list",
    "read_pairs",
    "rebuild_index",
    "write_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
