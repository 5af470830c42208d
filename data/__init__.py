"""Data: RecordIO shards, packing, inspection, sample order, loading, verification pairs.

The names load on first use, so that a program pays only for what it touches.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import RecordDataset
    from .errors import UsageError
    from .glyphs import pack_glyphs
    from .inspect import InspectReport, inspect_dataset
    from .order import SampleOrder
    from .packing import PackSummary, pack_folder
    from .pairs import Pairs, make_pairs, pairs_from_list, read_pairs, write_pairs
    from .pipeline import Batch, TrainLoader, decode_images
    from .recordio import RecordError
    from .shards import ShardedWriter
    from .synthetic import pack_synthetic

_HOME = {
    "RecordDataset": "dataset",
    "UsageError": "errors",
    "pack_glyphs": "glyphs",
    "InspectReport": "inspect",
    "inspect_dataset": "inspect",
    "SampleOrder": "order",
    "PackSummary": "packing",
    "pack_folder": "packing",
    "Pairs": "pairs",
    "make_pairs": "pairs",
    "pairs_from_list": "pairs",
    "read_pairs": "pairs",
    "write_pairs": "pairs",
    "Batch": "pipeline",
    "TrainLoader": "pipeline",
    "decode_images": "pipeline",
    "RecordError": "recordio",
    "ShardedWriter": "shards",
    "pack_synthetic": "synthetic",
}

__all__ = [
    "Batch",
    "InspectReport",
    "PackSummary",
    "Pairs",
    "RecordDataset",
    "RecordError",
    "SampleOrder",
    "ShardedWriter",
    "TrainLoader",
    "UsageError",
    "decode_images",
    "inspect_dataset",
    "make_pairs",
    "pack_folder",
    "pack_glyphs",
    "pack_synthetic",
    "pairs_from_list",
    "read_pairs",
    "write_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
