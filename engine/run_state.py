"""What of a run is saved, and how it comes back: on the same number of ranks or on another."""

from typing import Any

import torch
from torch import Tensor

from ..data.errors import UsageError
from . import checkpoint
from .build import Parts
from .distributed import World


def capture(parts: Parts, world: World) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This rank's tensors for a checkpoint, and the counters that belong to them."""
    tensors = _sharded(parts) | {f"rng/{world.rank}/cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        tensors[f"rng/{world.rank}/cuda"] = torch.cuda.get_rng_state()
    if world.is_main:
        tensors |= checkpoint.network_tensors(parts.network)
        tensors |= checkpoint.optimizer_tensors(parts.network, parts.backbone_optimizer)
    state = {
        "head_steps": parts.head.steps,
        "num_classes": parts.head.num_classes,
        "scaler": parts.scaler.state_dict(),
        "world_size": world.size,
    }
    return tensors, state


def restore(parts: Parts, found: checkpoint.Found, world: World) -> dict[str, Any]:
    """Reads a checkpoint into the parts; returns its counters.

    Raises:
        UsageError: it was written by a run that does not fit this one.
    """
    state, classes = found.state(), parts.head.num_classes
    if state["num_classes"] is None:
        raise UsageError(
            f"{found.path} holds a backbone without centers, so training cannot go on from it: convert the folder "
            "with the checkpoint_gpu_*.pt of all ranks"
        )
    if state["num_classes"] != classes:
        raise UsageError(
            f"{found.path} has {state['num_classes']} classes, this run's data set has {classes}: train it under "
            "another run.name, or on the data set that it was trained on"
        )
    tensors = checkpoint.network_tensors(parts.network) | _sharded(parts)
    _check(found, tensors, parts.backbone_optimizer)
    further = checkpoint.load(found, tensors, ("backbone_optimizer/", f"rng/{world.rank}/"))
    optimizer = {name: value for name, value in further.items() if name.startswith("backbone_optimizer/")}
    checkpoint.restore_optimizer(parts.network, parts.backbone_optimizer, optimizer)
    for name, value in further.items():
        if name.endswith("/cpu"):
            torch.set_rng_state(value)
        elif name.endswith("/cuda") and world.device.type == "cuda":
            torch.cuda.set_rng_state(value)
    parts.head.steps = state["head_steps"]
    if parts.scaler.is_enabled() and state["scaler"]:  # a run in another precision had none
        parts.scaler.load_state_dict(state["scaler"])
    return state


def _sharded(parts: Parts) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"head/centers": parts.head.centers}
    states = parts.head_optimizer.state_dict()["state"]
    return tensors | {f"head_optimizer/{name}": value for name, value in states.items()}


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
