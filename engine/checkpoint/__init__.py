"""Checkpoints: what a run needs to go on, on any number of ranks.

A checkpoint is a directory ``step-00000500`` with torch.distributed.checkpoint's files (the tensors, the sharded ones
in pieces that open on any number of ranks), ``state.json`` (the counters), ``config.yaml`` and ``labels.json``. It is
written under a temporary name and renamed when it is complete, so whatever has the name ``step-…`` can be loaded.
"""

from .directory import CONFIG, LABELS, Best, Found, find, find_all, find_latest
from .pieces import Piece, save_alone
from .reading import load, load_backbone, network_tensors, read_pieces
from .saver import Saver
from .writing import Content, agreed, from_first_rank, go_back, write

__all__ = [
    "CONFIG",
    "LABELS",
    "Best",
    "Content",
    "Found",
    "Piece",
    "Saver",
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
