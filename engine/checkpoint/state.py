"""What of a run is saved, and how it comes back: on the same number of ranks or on another, and what may change."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...data.errors import UsageError
from .. import device, label_map
from ..build import Parts
from ..config import Config, load_config
from ..config.loading import flat, shown
from ..initial import check_labels
from ..ranks.distributed import World
from .directory import CONFIG
from .reading import AVERAGE, Found, load, network_tensors
from .writing import Content, Piece

_OPTIMIZER = "backbone_optimizer/"
_OBJECTIVE = "head/objective/"


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
    tensors = {f"rng/{world.rank}/{kind}": value for kind, value in device.rng_states(world.device).items()}
    if world.is_main:
        tensors |= _backbone_tensors(parts)
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
    """Bytes of a checkpoint of all ranks."""
    sharded = sum(value.numel() * value.dtype.itemsize for value in _sharded(parts).values())
    whole = _backbone_tensors(parts)
    rng = world.size * sum(value.nbytes for value in device.rng_states(world.device).values())
    return sharded + sum(value.nbytes for value in whole.values()) + rng


def restore(
    parts: Parts, found: Found, world: World, config: Config, labels: bytes | None
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
    changed: list[str] = []
    if "converted" not in state:  # whose configuration is mostly defaults
        before = load_config(found.path / CONFIG)
        changed = changes(before, config, found.path, begun=state["position"] > 0)
    saved, tensors = found.shapes(), _backbone_tensors(parts) | _sharded(parts)
    states = [name for name in tensors if name.startswith(_OPTIMIZER) and not name.startswith(_OPTIMIZER + _OBJECTIVE)]
    if states and not any(name in saved for name in states):  # a converted one, or trained without momentum
        for name in states:
            tensors.pop(name).zero_()
        changed.append("begins     with a new state of the backbone's optimizer: the checkpoint has none")
    of_objective = [name for name in tensors if _OBJECTIVE in name and name not in saved]
    if of_objective:  # another objective, or one that the checkpoint's writer had none of
        for name in of_objective:
            tensors.pop(name)
        changed.append("begins     with a new state of the objective: the checkpoint has none")
    averages = [name for name in tensors if name.startswith(AVERAGE)]
    begin_average = bool(averages) and not any(name in saved for name in averages)
    if begin_average:
        for name in averages:
            tensors.pop(name)
        changed.append("begins     with a new average of the weights: the checkpoint has none")
    _check(found, tensors)
    seed_generators(config.run.seed, world.rank, state["step"])
    for name, value in load(found, tensors, (f"rng/{world.rank}/",)).items():
        device.set_rng_state(name.rpartition("/")[2], value, world.device)
    if begin_average and parts.average is not None:
        parts.average.restart(parts.network)
    parts.head.steps = state["head_steps"]
    if parts.scaler.is_enabled() and state["scaler"]:  # a run in another precision had none
        parts.scaler.load_state_dict(state["scaler"])
    if state["world_size"] != world.size:
        changed.append(f"changed    ranks: {state['world_size']} → {world.size}")
    return state, changed


def seed_generators(seed: int, rank: int, step: int = 0) -> None:
    """This rank's random generators, of dropout and the like: another stream on every rank.

    Args:
        seed: of the run.
        rank: this one.
        step: where the run goes on; of ranks that it had before, the checkpoint has the state.
    """
    (state,) = np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)
    torch.manual_seed(int(state))


def _sharded(parts: Parts) -> dict[str, DTensor]:
    tensors: dict[str, DTensor] = {"head/centers": parts.head.centers}
    states = parts.head_optimizer.state_dict()["state"]
    return tensors | {f"head_optimizer/{name}": value for name, value in states.items()}


def _backbone_tensors(parts: Parts) -> dict[str, Tensor]:
    """Weights and buffers of the network, its optimizer's state by parameter name, and the objective's numbers."""
    objective = parts.head.objective_state
    learned = {f"{_OBJECTIVE}{name}": parameter for name, parameter in objective.named_parameters()}
    state = {f"{_OBJECTIVE}{name}": value.detach() for name, value in objective.state_dict().items()}
    average = parts.average
    return (
        network_tensors(parts.network)
        | (network_tensors(average.network, AVERAGE) if average is not None else {})
        | state
        | {
            f"{_OPTIMIZER}{name}/{key}": value
            for name, parameter in (*parts.network.named_parameters(), *learned.items())
            for key, value in parts.backbone_optimizer.state[parameter].items()
        }
    )


def _check(found: Found, tensors: Mapping[str, Tensor]) -> None:
    saved = found.shapes()
    advice = "give run.name another name, or go back to the backbone and optimizers that it was trained with"
    for name, tensor in tensors.items():
        if name not in saved or saved[name].size != tensor.shape:
            there, here = list(saved[name].size) if name in saved else "nothing", list(tensor.shape)
            raise UsageError(
                f"{found.path} has another configuration: {name} is {there} there and {here} here; {advice}"
            )
    for name in saved:
        if name.startswith(_OPTIMIZER) and _OBJECTIVE not in name and name not in tensors:
            raise UsageError(
                f"{found.path} has another configuration: {name} does not belong to this backbone optimizer; {advice}"
            )


FIXED = {
    "backbone.name": "its weights belong to that network",
    "backbone.embedding_dim": "weights and centers have that length",
    "backbone.options": "its weights belong to that network",
    "optimizer.backbone.name": "its state belongs to that optimizer",
    "optimizer.head.name": "its state belongs to that optimizer",
    "run.seed": "the position in the order of samples, and the samples of classes, belong to that seed",
}
"""Keys that must be as they were, with the reason. Everything else may change, and is told where it does."""

_WITHOUT_MEANING = ("run.name", "run.dir", "init", "run.code", "checkpoint.check_labels")
_WHOLE = ("backbone.options", "optimizer.groups", "data.order", "head.objective")


def changes(before: Config, now: Config, checkpoint: Path, *, begun: bool) -> list[str]:
    """The keys that changed, one line each.

    Args:
        before: the checkpoint's configuration, complete.
        now: this run's.
        checkpoint: for the message.
        begun: whether samples were drawn already; a converted checkpoint begins its order anew.

    Raises:
        UsageError: a key of ``FIXED`` changed.
    """
    old, new = (flat(config.model_dump(), whole=_WHOLE) for config in (before, now))
    told = []
    for key in dict.fromkeys([*old, *new]):
        was, is_now = old.get(key), new.get(key)
        if was == is_now or key in _WITHOUT_MEANING or key.startswith("init."):
            continue
        if key in FIXED and (key != "run.seed" or begun):
            raise UsageError(
                f"{checkpoint} cannot go on with {key} {shown(is_now)}: it was {shown(was)} ({FIXED[key]}); put it "
                "back, or begin another run, with init.path if it shall start from these weights"
            )
        told.append(f"changed    {key}: {shown(was)} → {shown(is_now)}")
    return told
