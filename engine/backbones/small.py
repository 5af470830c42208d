"""A small residual network for images of about 32 to 48 pixels: trains in minutes on a CPU."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .registry import register
from .sizes import feature_map_size

Norm = Literal["batch", "group", "none"]


class ResidualBlock(nn.Module):
    """3×3 (stride) → norm → PReLU → 3×3 → norm, added to the input, PReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, padding=1, bias=norm == "none")
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=norm == "none"),
            _normalisation(norm, channels),
            nn.PReLU(channels),
            last,
            _normalisation(norm, channels),
        )
        if norm == "none":
            nn.init.zeros_(last.weight)  # the block begins as its shortcut, which keeps the scale without a norm
        self.shortcut = nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1, stride)
        self.prelu = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.shortcut(x) + self.layers(x))


class SmallNet(nn.Module):
    """images [b, 3, H, W] → embeddings [b, embedding_dim]

    Three residual blocks of ``width``, 2·``width`` and 4·``width`` channels on maps of 1/2, 1/4 and 1/8 of the image's
    size; a global depthwise convolution and a linear layer make the embedding.

    Args:
        width: channels of the first block, a multiple of 8.
        norm: "batch"; "group", which normalises each image by itself; or "none". With the last two an embedding
            depends on its own image alone, so training gives the same losses on any number of ranks.
    """

    def __init__(self, embedding_dim: int, image_size: tuple[int, int], width: int = 32, norm: Norm = "batch") -> None:
        super().__init__()
        height_width = feature_map_size(image_size, halvings=3)
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, padding=1, bias=norm == "none"),
            _normalisation(norm, width),
            nn.PReLU(width),
            ResidualBlock(width, width, 1, norm),
            ResidualBlock(width, 2 * width, 2, norm),
            ResidualBlock(2 * width, 4 * width, 2, norm),
            nn.Conv2d(4 * width, 8 * width, 1, bias=norm == "none"),
            _normalisation(norm, 8 * width),
            nn.PReLU(8 * width),
            nn.Conv2d(8 * width, 8 * width, height_width, groups=8 * width),
        )
        self.fc = nn.Linear(8 * width, embedding_dim)
        self.features = {
            "batch": nn.BatchNorm1d,
            "group": nn.LayerNorm,
            "none": nn.Identity,
        }[norm](embedding_dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(images).flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.float()))


def _normalisation(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels // 8, channels) if norm == "group" else nn.Identity()


@register("small")
def small(
    embedding_dim: Annotated[int, Field(ge=1)],
    image_size: tuple[int, int],
    width: Annotated[int, Field(ge=8, multiple_of=8)] = 32,
    norm: Norm = "batch",
) -> nn.Module:
    return SmallNet(embedding_dim, image_size, width, norm)
