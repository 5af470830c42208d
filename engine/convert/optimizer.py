"""The state of torch's optimizers over backbone and centers, as pfc's two optimizers keep it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..torch_files import TorchFile

# torch's name of a state → that of the row optimizer of the same kind.
_STATE = {
    "sgd": {"momentum_buffer": "momentum"},
    "adamw": {"exp_avg": "first_moment", "exp_avg_sq": "second_moment", "step": "steps"},
}
_SETTINGS = {"sgd": ("momentum", "weight_decay", "nesterov"), "adamw": ("betas", "eps", "weight_decay")}


@dataclass
class OptimizerState:
    """What a checkpoint takes over.

    Attributes:
        backbone: "<parameter>/<state>" → tensor.
        head: name of the row optimizer's state → each rank's [rows, ...]; zeros where nothing in the files fits.
        sections: of the configuration, optimizer.backbone and optimizer.head.
        notes: what could not be taken over.
    """

    backbone: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, list[Tensor]] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_optimizer(ranks: list[TorchFile], parameters: dict[str, torch.Size], centers: list[Tensor]) -> OptimizerState:
    """Takes over SGD's momentum, or AdamW's moments and steps.

    Args:
        ranks: the files; each holds ``state_optimizer``, whose parameters are the backbone's and then the centers.
        parameters: name → shape of the backbone's, in the order in which the optimizer counts them.
        centers: each rank's [rows, D].
    """
    groups = ranks[0].at("state_optimizer", "param_groups")
    groups = [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []
    kind = _kind(groups)
    result = OptimizerState()
    if kind is not None:
        first, last = _section(kind, groups[0]), _section(kind, groups[-1])
        result.sections = {"backbone": {"name": kind, **first}, "head": {"name": f"row_{kind}", **last}}
    numbers = [number for group in groups for number in group.get("params", ())]
    if kind is None or len(numbers) != len(parameters) + 1:
        result.notes.append("state_optimizer is not SGD's or AdamW's over backbone and centers: it starts empty")
    else:
        _take_backbone(result, ranks[0], kind, dict(zip(numbers, parameters.items(), strict=False)))
        _take_head(result, ranks, kind, numbers[-1], centers)
    if not result.head:
        result.head = {
            name: [torch.zeros(()).expand(len(rows), 1 if name == "steps" else rows.shape[1]) for rows in centers]
            for name in _STATE[kind or "sgd"].values()
        }
    return result


def _kind(groups: list[Mapping[str, Any]]) -> str | None:
    """torch's optimizers are told by what their groups hold: only SGD has dampening, only Adam and AdamW betas."""
    if groups and "dampening" in groups[0]:
        return "sgd"
    return "adamw" if groups and "betas" in groups[0] else None


def _section(kind: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Its settings, with the learning rate that its scheduler began from."""
    section = {key: group[key] for key in _SETTINGS[kind] if isinstance(group.get(key), (int, float))}
    if isinstance(betas := group.get("betas"), tuple):
        section["betas"] = list(betas)
    peak = group.get("initial_lr", group.get("lr"))
    return section | ({"lr": float(peak)} if isinstance(peak, (int, float)) and peak > 0 else {})


def _take_backbone(
    result: OptimizerState, file: TorchFile, kind: str, parameters: dict[int, tuple[str, torch.Size]]
) -> None:
    try:
        states = {name: _state(file, kind, number, shape) for number, (name, shape) in parameters.items()}
    except _MisfitError as misfit:
        result.notes.append(f"optimizer state of the backbone: {misfit}: it starts empty")
        return
    result.backbone = {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}
    if not result.backbone:
        result.notes.append(f"{file.path.name} has no optimizer state of the backbone: it starts empty")


def _take_head(result: OptimizerState, ranks: list[TorchFile], kind: str, number: int, centers: list[Tensor]) -> None:
    found: dict[str, list[Tensor]] = {name: [] for name in _STATE[kind].values()}
    for file, rows in zip(ranks, centers, strict=True):
        try:
            state = _state(file, kind, number, rows.shape)
        except _MisfitError as misfit:
            # The implementation's first version optimised a copy of the rows that it had sampled.
            result.notes.append(f"optimizer state of the centers: {misfit}: it begins at zero")
            return
        if not state:
            result.notes.append(f"{file.path.name} has no optimizer state of the centers: it begins at zero")
            return
        for key, name in _STATE[kind].items():
            found[name].append(state[key].expand(len(rows), 1) if key == "step" else state[key])
    result.head = found


class _MisfitError(Exception):
    """What in a file does not fit its parameter."""


def _state(file: TorchFile, kind: str, number: int, shape: torch.Size) -> dict[str, Tensor]:
    """torch's state of one parameter; empty where there is none (it is not trained, or SGD has no momentum)."""
    states = file.at("state_optimizer", "state")
    state = states.get(number) if isinstance(states, Mapping) else None
    if not isinstance(state, Mapping) or all(state.get(key) is None for key in _STATE[kind]):
        return {}
    values: dict[str, Tensor] = {}
    for key in _STATE[kind]:
        value = state.get(key)
        if isinstance(value, (int, float)):  # the steps, in older versions of torch
            value = torch.tensor(float(value))
        expected = torch.Size() if key == "step" else shape
        if not isinstance(value, Tensor) or value.shape != expected:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise _MisfitError(f"{key} in {file.path.name} is {found} for {list(shape)}")
        values[key] = value.float()
    return values
