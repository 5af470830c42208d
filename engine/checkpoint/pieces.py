"""Large tensors that lie in pieces, such as each rank's rows of the centers; never put together to be written."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor.

    Attributes:
        rows: [n, ...], on any device; n may be 0.
        start: which row of the whole the first one is.
        total: rows of the whole.
        dtype: as which they are written, one piece at a time, so that pieces mapped from a file take no memory.
    """

    rows: Tensor
    start: int
    total: int
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return torch.Size((self.total, *self.rows.shape[1:]))

    @property
    def nbytes(self) -> int:
        """On disk."""
        return self.rows.numel() * self.dtype.itemsize


class PiecesPlanner(DefaultSavePlanner):
    """Plans plain tensors as torch does, and pieces as a rank's shards of those tensors."""

    def __init__(self, pieces: Mapping[str, Sequence[Piece]]) -> None:
        super().__init__()
        self._pieces: dict[tuple[str, torch.Size | None], Piece] = {}
        self._items: list[WriteItem] = []
        for name, parts in pieces.items():
            for piece in parts:
                if len(piece.rows):
                    self._add(name, piece)

    def _add(self, name: str, piece: Piece) -> None:
        offset = torch.Size((piece.start, *[0] * (piece.rows.ndim - 1)))
        self._pieces[name, offset] = piece
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offset, sizes=piece.rows.shape),
            properties=TensorProperties(dtype=piece.dtype),
            size=piece.shape,
        )
        self._items.append(WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data))

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=[*plan.items, *self._items])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        piece = self._pieces.get((index.fqn, index.offset))
        return super().lookup_object(index) if piece is None else piece.rows.to(piece.dtype).contiguous()


def save_alone(folder: Path, tensors: dict[str, Tensor], pieces: Mapping[str, Sequence[Piece]]) -> None:
    """Writes torch.distributed.checkpoint's files, in this process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(tensors, checkpoint_id=folder, planner=PiecesPlanner(pieces), no_dist=True)
