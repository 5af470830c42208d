"""Checkpoints: what a run needs to go on, on any number of ranks.

A checkpoint is a directory ``step-00000500`` with torch.distributed.checkpoint's files (the tensors, the sharded ones
in pieces that open on any number of ranks), ``state.json`` (the counters), ``config.yaml`` and ``labels.json``. It is
written under a temporary name and renamed when it is complete, so whatever has the name ``step-…`` can be loaded.
"""

from .directory import CONFIG, LABELS, Best, find, find_all, find_latest, go_back, load_backbone
from .reading import AVERAGE, BACKBONE, Found, load, network_tensors, read_pieces
from .writing import Content, Piece, agreed, from_first_rank, save_alone, write

__all__ = [
    "AVERAGE",
    "BACKBONE",
    "CONFIG",
    "LABELS",
    "Best",
    "Content",
    "Found",
    "Piece",
    "agreed",
    "find",
    "find_all",
    "find_latest",
    "from_first_rank",
    "go_back",
    "load",
    "load_backbone",
    "network_tensors",
    "read_pieces",
    "save_alone",
    "write",
]
