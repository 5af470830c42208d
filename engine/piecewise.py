"""Writing a checkpoint whose large tensors lie in pieces, without ever putting them together."""

import dataclasses
import itertools
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


def save(folder: Path, tensors: dict[str, Tensor], pieces: dict[str, list[Tensor]]) -> None:
    """Writes torch.distributed.checkpoint's files, in this process alone.

    Args:
        folder: where to.
        tensors: those that are whole.
        pieces: those that are the concatenation of several [rows, ...], of any floating dtype; written as float32, one
            at a time, so that pieces mapped from a file take no memory.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(tensors, checkpoint_id=folder, planner=_PiecewisePlanner(pieces), no_dist=True)


class _PiecewisePlanner(DefaultSavePlanner):
    """Adds each piece to the plan as what a rank's shard of that tensor would be."""

    def __init__(self, pieces: dict[str, list[Tensor]]) -> None:
        super().__init__()
        self.parts: dict[tuple[str, torch.Size | None], Tensor] = {}
        self.items: list[WriteItem] = []
        for name, parts in pieces.items():
            self._add(name, [part for part in parts if len(part)])

    def _add(self, name: str, parts: list[Tensor]) -> None:
        starts = itertools.accumulate((len(part) for part in parts), initial=0)
        whole = torch.Size((sum(len(part) for part in parts), *parts[0].shape[1:]))
        for start, part in zip(starts, parts, strict=False):
            offset = torch.Size((start, *[0] * (part.ndim - 1)))
            self.parts[name, offset] = part
            self.items.append(
                WriteItem(
                    index=MetadataIndex(name, offset),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(offsets=offset, sizes=part.shape),
                        properties=TensorProperties(dtype=torch.float32),
                        size=whole,
                    ),
                )
            )

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=[*plan.items, *self.items])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        part = self.parts.get((index.fqn, index.offset))
        return super().lookup_object(index) if part is None else part.float().contiguous()
