"""Which network a state_dict of the common implementation is of."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...data.errors import UsageError
from ..backbones import build_backbone
from ..backbones.iresnet import CHANNELS, DEPTHS

_STRIDE = 16  # of IResNet: pixels of the image, on a side, for one element of the last feature map


@dataclass(frozen=True)
class Network:
    """A backbone of pfc, and a state_dict that fits it.

    Attributes:
        name: as in backbone.name.
        embedding_dim: D.
        image_size: (height, width) in pixels.
        weights: the whole state_dict, under the network's own names.
        parameters: name → shape of its parameters, in the order of the state_dict, in which torch.optim counted them.
    """

    name: str
    embedding_dim: int
    image_size: tuple[int, int]
    weights: dict[str, Tensor]
    parameters: dict[str, torch.Size]


def find_network(
    path: Path, weights: dict[str, Tensor], name: str | None = None, image_size: tuple[int, int] | None = None
) -> Network:
    """The network that the weights are of.

    Args:
        path: the file that they come from, for messages.
        weights: a state_dict, also one of DistributedDataParallel (``module.`` before every name).
        name: of the network; the IResNet with that many blocks when None.
        image_size: the square image that gives ``fc`` its number of features when None.

    Raises:
        UsageError: name or size cannot be told, or some tensor does not fit.
    """
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    name = name or _iresnet(path, weights)
    fc = weights.get("fc.weight")
    if fc is None or fc.ndim != 2:
        raise UsageError(f"{path} has no fc.weight [embedding_dim, features]: a network has to end in such a layer")
    size = image_size or _square(path, fc.shape[1])
    with torch.device("meta"):
        network = build_backbone(name, embedding_dim=fc.shape[0], image_size=size)
    expected = network.state_dict()
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} is not one of its names" for key in weights if key not in expected]
    problems += [
        f"{key} is {list(weights[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UsageError(f"{path} does not fit {name} with images of {size[0]}×{size[1]}: {problems[0]}{more}")
    shapes = {key: value.shape for key, value in network.named_parameters()}
    return Network(
        name,
        fc.shape[0],
        size,
        {key: weights[key].to(value.dtype) for key, value in expected.items()},
        {key: shapes[key] for key in weights if key in shapes},
    )


def _iresnet(path: Path, weights: dict[str, Tensor]) -> str:
    depths = tuple(_blocks(weights, layer) for layer in (1, 2, 3, 4))
    for number, known in DEPTHS.items():
        if depths == known:
            return f"iresnet{number}"
    raise UsageError(
        f"{path}: layer1 to layer4 have {', '.join(map(str, depths))} blocks, which is no IResNet of "
        f"{', '.join(map(str, DEPTHS))} layers: give --backbone NAME if it is another network that pfc has"
    )


def _blocks(weights: dict[str, Tensor], layer: int) -> int:
    found = (re.match(rf"layer{layer}\.(\d+)\.", key) for key in weights)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _square(path: Path, features: int) -> tuple[int, int]:
    side = math.isqrt(features // CHANNELS[3])
    if side == 0 or CHANNELS[3] * side * side != features:
        raise UsageError(f"{path}: fc takes {features} features, which no square image gives: give --size HxW")
    return side * _STRIDE, side * _STRIDE
