"""Reading checkpoints: into a run on any number of ranks, or the backbone alone."""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from ...data.errors import UsageError
from ..backbones import build_backbone
from ..build import input_size
from ..config import Config, load_config
from .directory import CONFIG, Found, find
from .metadata import Reader, read_metadata


def load(found: Found, tensors: dict[str, Tensor], prefixes: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Reads tensors in place; each rank gets its part of the DTensors, however many ranks wrote them.

    Args:
        tensors: where to; their names and shapes must be in the checkpoint.
        prefixes: further tensors to read, all whose names begin so.

    Returns:
        The further tensors.

    Raises:
        UsageError: the files are damaged, or hold what is no tensor.
    """
    further = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.shapes().items()
        if name.startswith(prefixes) and name not in tensors
    }
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            # Reading without a process group is what `pfc evaluate` means to do.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({**tensors, **further}, storage_reader=Reader(found.path), no_dist=alone)
    except CheckpointException as error:
        raise _unreadable(found.path, next(iter(error.failures.values()))[0]) from None
    return further


def read_pieces(found: Found, name: str) -> Iterator[tuple[int, Tensor]]:
    """The pieces of a sharded tensor as they were written, (first row, [rows, ...]), one at a time in memory.

    Raises:
        UsageError: the files are damaged, or hold what is no tensor.
    """
    for index, place in read_metadata(found.path).storage_data.items():
        if index.fqn != name:
            continue
        path = found.path / place.relative_path
        with path.open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
        try:
            rows = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # damaged in one of many ways, or not weights only
            raise _unreadable(path, error) from None
        yield (index.offset[0] if index.offset else 0), rows


def load_backbone(run_or_checkpoint: Path) -> tuple[nn.Module, Config]:
    """The trained network in evaluation mode, on the CPU, and the configuration of its run.

    Args:
        run_or_checkpoint: a run's directory (its latest checkpoint is taken) or a checkpoint's.
    """
    found = find(run_or_checkpoint)
    config = load_config(found.path / CONFIG)
    section = config.backbone
    network = build_backbone(
        section.name, embedding_dim=section.embedding_dim, image_size=input_size(config), **section.options
    )
    load(found, network_tensors(network))
    return network.eval(), config


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers under the names that they have in a checkpoint."""
    return {f"backbone/{name}": value for name, value in network.state_dict().items()}


def _unreadable(path: Path, error: BaseException) -> Exception:
    if isinstance(error, UsageError):
        return UsageError(str(error))
    reason = " ".join(str(error).split(". ")[0].split()) or type(error).__name__
    return UsageError(f"{path} cannot be read: {reason[:200]}; no code in a file is run; take another checkpoint")
