"""Checkpoints: what a run needs to go on, on any number of ranks.

A checkpoint is a directory ``step-00000500`` with torch.distributed.checkpoint's files (the tensors, the sharded ones
as DTensors), ``state.json`` (the counters) and ``config.yaml``. It is written under a temporary name and renamed when
it is complete, so whatever has the name ``step-…`` can be loaded.
"""

import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..data.errors import UsageError
from .backbones import build_backbone
from .build import input_size
from .config import Config, load_config

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Found:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """The counters that ``save`` was given."""
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))

    def shapes(self) -> dict[str, TensorStorageMetadata]:
        """Name → size and dtype of every tensor in it."""
        metadata = dcp.FileSystemReader(self.path).read_metadata().state_dict_metadata
        return {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


def save(
    run_dir: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], config: Config, keep: int
) -> Path:
    """Writes a checkpoint and removes all but the ``keep`` latest. Called by all ranks together.

    Args:
        tensors: of this rank: DTensors on every rank, a plain tensor on the one rank that shall write it.
        state: counters, as JSON can hold them.
    """
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}.partial")
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    dcp.save(tensors, checkpoint_id=temporary)
    if main:
        (temporary / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        _sync(temporary / "state.json")
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _sync(final.parent)
        for old in find_all(run_dir)[:-keep]:
            shutil.rmtree(old.path)
    dist.barrier()
    return final


def load(found: Found, tensors: dict[str, Tensor], prefixes: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Reads tensors in place; each rank gets its part of the DTensors, however many ranks wrote them.

    Args:
        tensors: where to; their names and shapes must be in the checkpoint.
        prefixes: further tensors to read, all whose names begin so.

    Returns:
        The further tensors.
    """
    further = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.shapes().items()
        if name.startswith(prefixes) and name not in tensors
    }
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        # Reading without a process group is what `pfc evaluate` means to do.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load({**tensors, **further}, checkpoint_id=found.path, no_dist=alone)
    return further


def find_all(run_dir: Path) -> list[Found]:
    """The complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    names = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    return sorted((Found(path, int(match[1])) for path, match in names if match), key=lambda found: found.step)


def find(path: Path) -> Found:
    """The checkpoint at ``path``, or the latest of the run there.

    Raises:
        UsageError: there is none.
    """
    match = _NAME.fullmatch(path.name)
    if match and (path / "state.json").is_file():
        return Found(path, int(match[1]))
    if not path.exists():
        raise UsageError(f"{path}: no such run or checkpoint")
    checkpoints = find_all(path)
    if not checkpoints:
        raise UsageError(f"{path}: no complete checkpoint there; give a run's directory or its checkpoints/step-*")
    return checkpoints[-1]


def load_backbone(run_or_checkpoint: Path) -> tuple[nn.Module, Config]:
    """The trained network in evaluation mode, on the CPU, and the configuration of its run.

    Args:
        run_or_checkpoint: a run's directory (its latest checkpoint is taken) or a checkpoint's.
    """
    found = find(run_or_checkpoint)
    config = load_config(found.path / "config.yaml")
    section = config.backbone
    network = build_backbone(
        section.name, embedding_dim=section.embedding_dim, image_size=input_size(config), **section.options
    )
    load(found, network_tensors(network))
    return network.eval(), config


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers under the names that they have in a checkpoint."""
    return {f"backbone/{name}": value for name, value in network.state_dict().items()}


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of the backbone's optimizer, by parameter name."""
    return {
        f"backbone_optimizer/{name}/{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts what ``optimizer_tensors`` gave back into the state of an optimizer that has not stepped yet."""
    parameters = dict(network.named_parameters())
    for path, value in tensors.items():
        _, name, key = path.split("/")
        parameter = parameters[name]
        # Counters of steps stay on the CPU, where the optimizers keep them.
        optimizer.state[parameter][key] = value.to(parameter.device) if value.ndim else value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
