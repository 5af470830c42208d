"""MobileFaceNet (Chen et al., CCBR 2018, arXiv:1804.07573), table 1 of the paper."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from .registry import register
from .sizes import feature_map_size

# (expansion t, channels c, repeats n, stride s of the first repeat)
BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


class Bottleneck(nn.Module):
    """1×1 expansion → 3×3 depthwise (stride) → linear 1×1; added to the input where the shape stays."""

    def __init__(self, in_channels: int, channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.layers = nn.Sequential(
            *_conv(in_channels, hidden, 1),
            nn.PReLU(hidden),
            *_conv(hidden, hidden, 3, stride, groups=hidden),
            nn.PReLU(hidden),
            *_conv(hidden, channels, 1),
        )
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileFaceNet(nn.Module):
    """images [b, 3, H, W] → embeddings [b, embedding_dim]

    The global depthwise convolution weighs every place of the last feature map, whatever its size: 7×7 for the
    paper's 112×112 images. The paper's embedding_dim is 128.
    """

    def __init__(self, embedding_dim: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        height, width = feature_map_size(image_size, halvings=4)
        layers: list[nn.Module] = [*_conv(3, 64, 3, 2), nn.PReLU(64), *_conv(64, 64, 3, groups=64), nn.PReLU(64)]
        channels = 64
        for expansion, out_channels, repeats, first_stride in BOTTLENECKS:
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                layers.append(Bottleneck(channels, out_channels, expansion, stride))
                channels = out_channels
        layers += [*_conv(channels, 512, 1), nn.PReLU(512)]
        self.layers = nn.Sequential(*layers)
        self.global_depthwise = nn.Sequential(
            nn.Conv2d(512, 512, (height, width), groups=512, bias=False), nn.BatchNorm2d(512)
        )
        self.fc = nn.Linear(512, embedding_dim, bias=False)
        self.features = nn.BatchNorm1d(embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", a=0.25)  # 0.25: PReLU's first slope

    def forward(self, images: Tensor) -> Tensor:
        x = self.global_depthwise(self.layers(images)).flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.float()))


def _conv(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(channels)


@register("mobilefacenet")
def mobilefacenet(embedding_dim: Annotated[int, Field(ge=1)], image_size: tuple[int, int]) -> nn.Module:
    return MobileFaceNet(embedding_dim, image_size)
