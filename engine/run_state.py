"""What of a run is saved, and how it comes back: on the same number of ranks or on another."""

import importlib.metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..data.errors import UsageError
from . import checkpoint, label_map, resume_rules
from .build import Parts
from .checkpoint import Content, Piece
from .config import Config, load_config
from .distributed import World
from .initial import check_labels


def capture(
    parts: Parts, world: World, config: Config, step: int, labels: bytes | None, counters: dict[str, Any]
) -> Content:
    """This rank's part of a checkpoint: the tensors themselves, not copies.

    Args:
        parts: what is trained.
        world: this rank's place.
        config: of the run, completed.
        step: optimizer steps done.
        labels: the label map of the data set.
        counters: of the trainer, as JSON can hold them.
    """
    tensors = {f"rng/{world.rank}/cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        tensors[f"rng/{world.rank}/cuda"] = torch.cuda.get_rng_state()
    if world.is_main:
        tensors |= checkpoint.network_tensors(parts.network)
        tensors |= _optimizer_tensors(parts.network, parts.backbone_optimizer)
    shard = parts.head.shard
    pieces = {
        name: Piece(value.to_local().detach(), shard.start, shard.num_classes, value.dtype)
        for name, value in _sharded(parts).items()
    }
    state = {
        "head_steps": parts.head.steps,
        "num_classes": parts.head.num_classes,
        "label_map": label_map.hash_of(labels),
        "scaler": parts.scaler.state_dict(),
        "world_size": world.size,
        "versions": versions(),
        **counters,
    }
    return Content(step, tensors, pieces, state, config.to_yaml(), labels)


def versions() -> dict[str, str]:
    """Of what writes a checkpoint."""
    return {"pfc": importlib.metadata.version("pfc"), "torch": torch.__version__}


def size_of(parts: Parts, world: World) -> int:
    """Bytes of a checkpoint of all ranks, with the state that the backbone's optimizer makes in its first step."""
    sharded = sum(value.numel() * value.dtype.itemsize for value in _sharded(parts).values())
    weights = sum(parameter.nbytes for parameter in parts.network.parameters())
    states = 2 if isinstance(parts.backbone_optimizer, torch.optim.AdamW) else 1
    rng = world.size * torch.get_rng_state().nbytes
    return sharded + sum(value.nbytes for value in parts.network.state_dict().values()) + states * weights + rng


def restore(
    parts: Parts, found: checkpoint.Found, world: World, config: Config, labels: bytes | None
) -> tuple[dict[str, Any], list[str]]:
    """Reads a checkpoint into the parts; returns its counters, and what changed since, one line each.

    Raises:
        UsageError: it was written by a run that does not fit this one.
    """
    state, classes = found.state(), parts.head.num_classes
    if state["num_classes"] is None:
        raise UsageError(
            f"{found.path} holds a backbone without centers, so training cannot go on from it: convert the folder "
            "with the checkpoint_gpu_*.pt of all ranks, or begin a run with init.path"
        )
    if state["num_classes"] != classes:
        raise UsageError(
            f"{found.path} has {state['num_classes']} classes, this run's data set has {classes}: train it on the data "
            "set that it was trained on, or begin a run of another run.name with init.path, and init.centers: by_name"
        )
    check_labels(config, found, labels)
    told: list[str] = []
    if "converted" not in state:  # whose configuration is mostly defaults
        before = load_config(found.path / checkpoint.CONFIG)
        told = resume_rules.changes(before, config, found.path, begun=state["position"] > 0)
    tensors = checkpoint.network_tensors(parts.network) | _sharded(parts)
    _check(found, tensors, parts.backbone_optimizer)
    further = checkpoint.load(found, tensors, ("backbone_optimizer/", f"rng/{world.rank}/"))
    optimizer = {name: value for name, value in further.items() if name.startswith("backbone_optimizer/")}
    _restore_optimizer(parts.network, parts.backbone_optimizer, optimizer)
    for name, value in further.items():
        if name.endswith("/cpu"):
            torch.set_rng_state(value)
        elif name.endswith("/cuda") and world.device.type == "cuda":
            torch.cuda.set_rng_state(value)
    parts.head.steps = state["head_steps"]
    if parts.scaler.is_enabled() and state["scaler"]:  # a run in another precision had none
        parts.scaler.load_state_dict(state["scaler"])
    if state["world_size"] != world.size:
        told.append(f"changed    ranks: {state['world_size']} → {world.size}")
    return state, told


def _sharded(parts: Parts) -> dict[str, DTensor]:
    tensors: dict[str, DTensor] = {"head/centers": parts.head.centers}
    states = parts.head_optimizer.state_dict()["state"]
    return tensors | {f"head_optimizer/{name}": value for name, value in states.items()}


def _optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of the backbone's optimizer, by parameter name."""
    return {
        f"backbone_optimizer/{name}/{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts what ``_optimizer_tensors`` gave back into the state of an optimizer that has not stepped yet."""
    parameters = dict(network.named_parameters())
    for path, value in tensors.items():
        _, name, key = path.split("/")
        parameter = parameters[name]
        # Counters of steps stay on the CPU, where the optimizers keep them.
        optimizer.state[parameter][key] = value.to(parameter.device) if value.ndim else value


def _check(found: checkpoint.Found, tensors: dict[str, Tensor], backbone_optimizer: torch.optim.Optimizer) -> None:
    saved = found.shapes()
    advice = "give run.name another name, or go back to the backbone and optimizers that it was trained with"
    for name, tensor in tensors.items():
        if name not in saved or saved[name].size != tensor.shape:
            there, here = list(saved[name].size) if name in saved else "nothing", list(tensor.shape)
            raise UsageError(
                f"{found.path} has another configuration: {name} is {there} there and {here} here; {advice}"
            )
    adam = isinstance(backbone_optimizer, torch.optim.AdamW)
    known = {"exp_avg", "exp_avg_sq", "step"} if adam else {"momentum_buffer"}
    for name in saved:
        if name.startswith("backbone_optimizer/") and name.rpartition("/")[2] not in known:
            raise UsageError(
                f"{found.path} has another configuration: {name} does not belong to this backbone optimizer; {advice}"
            )
