"""IResNet, the residual network of the ArcFace paper (Deng et al., CVPR 2019, arXiv:1801.07698).

Submodules carry the names of the common PyTorch implementation, so that its ``model.pt`` files load as they are.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from .registry import register
from .sizes import feature_map_size

CHANNELS = (64, 128, 256, 512)  # of layer1 to layer4; each begins with a stride of 2
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}


class IBasicBlock(nn.Module):
    """norm → 3×3 → norm → PReLU → 3×3 (stride) → norm, added to the input: [b, c, H, W] → [b, c', H/stride, …]."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        y = self.bn3(self.conv2(y))
        return y + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """images [b, 3, H, W] → embeddings [b, embedding_dim]

    Args:
        depths: number of blocks in each of the four layers.
        embedding_dim: length of an embedding.
        image_size: (height, width) in pixels; 112×112 in the paper.
        dropout: probability of dropping an element of the last feature map (0.4 in the paper, 0 in most later runs).
    """

    def __init__(
        self, depths: tuple[int, int, int, int], embedding_dim: int, image_size: tuple[int, int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        height, width = feature_map_size(image_size, halvings=4)
        self.conv1 = nn.Conv2d(3, CHANNELS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS[0])
        self.prelu = nn.PReLU(CHANNELS[0])
        self.layer1 = _layer(CHANNELS[0], CHANNELS[0], depths[0])
        self.layer2 = _layer(CHANNELS[0], CHANNELS[1], depths[1])
        self.layer3 = _layer(CHANNELS[1], CHANNELS[2], depths[2])
        self.layer4 = _layer(CHANNELS[2], CHANNELS[3], depths[3])
        self.bn2 = nn.BatchNorm2d(CHANNELS[3])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(CHANNELS[3] * height * width, embedding_dim)
        # The embedding is normalised afterwards, so a scale per element would only compete with the direction.
        self.features = nn.BatchNorm1d(embedding_dim)
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(self.bn2(x)).flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.float()))


def _layer(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    blocks = [IBasicBlock(in_channels, channels, stride=2)]
    blocks += [IBasicBlock(channels, channels, stride=1) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def _factory(depths: tuple[int, int, int, int]) -> Callable[..., nn.Module]:
    def iresnet(
        embedding_dim: Annotated[int, Field(ge=1)],
        image_size: tuple[int, int],
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> nn.Module:
        return IResNet(depths, embedding_dim, image_size, dropout)

    return iresnet


for _number, _depths in DEPTHS.items():
    register(f"iresnet{_number}")(_factory(_depths))
