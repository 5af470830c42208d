"""Parameters of the backbone that are trained in another way: other rates, no weight decay, frozen for a time."""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..data.errors import UsageError
from .backbones.recompute import repeated
from .config import Optimizer


@dataclass(frozen=True)
class Treatment:
    """How one parameter is trained.

    Attributes:
        lr: share of the backbone's learning rate.
        weight_decay: its own.
        frozen_until: steps for which it stays as it is; infinity for ever.
    """

    lr: float
    weight_decay: float
    frozen_until: float = 0


def treatments(network: nn.Module, section: Optimizer) -> dict[str, Treatment]:
    """Of every parameter of the network that is trained, by its name, as ``optimizer.groups`` says.

    Raises:
        UsageError: a group names no parameter.
    """
    parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
    found = dict.fromkeys(parameters, Treatment(1.0, section.backbone.weight_decay))
    blocks = block_numbers(network)
    for place, group in enumerate(section.groups):
        patterns = [group.names] if isinstance(group.names, str) else group.names
        for pattern in patterns:
            if not fnmatch.filter(parameters, pattern):
                some = ", ".join(list(parameters)[:4])
                raise UsageError(
                    f"optimizer.groups[{place}].names: {pattern!r} names no parameter of this backbone; names are such "
                    f"as {some} (* stands for any part)"
                )
        named = {name for pattern in patterns for name in fnmatch.filter(parameters, pattern)}
        if group.vectors is not None:
            named = {name for name in named if (parameters[name].ndim <= 1) == group.vectors}
        deepest = max((blocks[name] for name in parameters), default=0)
        for name in named:
            lr = group.lr
            if group.layer_decay is not None:
                lr = (1.0 if lr is None else lr) * group.layer_decay ** (deepest - blocks[name])
            changed: dict[str, Any] = {
                "lr": lr,
                "weight_decay": group.weight_decay,
                "frozen_until": math.inf if group.frozen_until == "end" else group.frozen_until,
            }
            found[name] = replace(found[name], **{key: value for key, value in changed.items() if value is not None})
    return found


def block_numbers(network: nn.Module) -> dict[str, int]:
    """In which block each parameter is: 0 for what comes before the blocks, then one number a block, and one more for
    what follows the last. Blocks are those of ``recompute.repeated``, or what the network's own ``block_numbers`` says.
    """
    own: Mapping[str, int] | None = network.block_numbers() if hasattr(network, "block_numbers") else None  # type: ignore
    if own is not None:
        return dict(own)
    blocks = list(repeated(network))
    places = {id(parameter): place for place, block in enumerate(blocks, 1) for parameter in block.parameters()}
    numbers: dict[str, int] = {}
    current = 0
    for name, parameter in network.named_parameters():
        if id(parameter) in places:
            current = places[id(parameter)]
            numbers[name] = current
        else:
            numbers[name] = current + (current == len(blocks) > 0)
    return numbers


def optimizer_groups(network: nn.Module, found: Mapping[str, Treatment]) -> list[dict[str, Any]]:
    """torch.optim's groups: parameters that have their rate and weight decay in common; ``share`` of the rate."""
    parameters = dict(network.named_parameters())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, one in found.items():
        groups.setdefault((one.lr, one.weight_decay), []).append(parameters[name])
    return [
        {"params": members, "share": share, "weight_decay": weight_decay}
        for (share, weight_decay), members in groups.items()
    ]


def freeze(network: nn.Module, found: Mapping[str, Treatment], step: int) -> None:
    """Freezes and thaws for the step of this number, from 0.

    What is frozen gets no gradient. BatchNorm of which all is frozen keeps its statistics too: see ``resting``.
    """
    for name, one in found.items():
        network.get_parameter(name).requires_grad_(step >= one.frozen_until)


def resting(network: nn.Module, found: Mapping[str, Treatment], step: int) -> list[nn.Module]:
    """The modules of which every parameter is frozen in that step: no dropout there, and no new statistics."""
    frozen = {name for name, one in found.items() if step < one.frozen_until}
    if not frozen:
        return []
    modules = []
    for prefix, module in network.named_modules():
        names = [f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()]
        names = [name for name in names if name in found]
        if names and frozen.issuperset(names):
            modules.append(module)
    return modules
