"""The vision transformer of face recognition: the features of all patches, side by side, make the embedding.

Submodules are named as in the common PyTorch implementation, so its weights load.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ...data.errors import UsageError
from .registry import register


class PatchEmbedding(nn.Module):
    """images [b, 3, H, W] → patches [b, N, width]; pixels beyond the last whole patch are left out"""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, patches, width = x.shape
        q, k, v = self.qkv(x).view(batch, patches, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, patches, width))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.ReLU6()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm; in training each of the two branches is left out of a share ``drop`` of the images."""

    def __init__(self, width: int, heads: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.attn(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        """Stochastic depth (Huang et al. 2016), image by image, the rest scaled up."""
        if not self.training or not self.drop:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop
        return branch * (kept / (1 - self.drop)).to(branch.dtype)


class VisionTransformer(nn.Module):
    """images [b, 3, H, W] → embeddings [b, embedding_dim]

    Args:
        width, depth, heads: of the transformer.
        patch: pixels of a patch, on a side.
        drop_path: share of the images that leave out a branch of the last block; less in those before, 0 in the first.
        mask: share of the patches of a training image that the transformer is not shown; ``mask_token`` takes their
            place behind it.
    """

    def __init__(
        self,
        embedding_dim: int,
        image_size: tuple[int, int],
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        drop_path: float,
        mask: float,
    ) -> None:
        super().__init__()
        patches = (image_size[0] // patch) * (image_size[1] // patch)
        if not patches:
            raise UsageError(
                f"backbone.options.patch: images of {image_size[0]}×{image_size[1]} pixels hold no patch of "
                f"{patch}×{patch}"
            )
        if mask and int(patches * (1 - mask)) < 1:
            raise UsageError(f"backbone.options.mask: {mask} of {patches} patches leaves none")
        self.mask = mask
        self.patch_embed = PatchEmbedding(patch, width)
        self.pos_embed = nn.Parameter(nn.init.normal_(torch.zeros(1, patches, width), std=0.02))
        # Not trained where nothing is masked: DistributedDataParallel wants a gradient of all that is.
        self.mask_token = nn.Parameter(nn.init.normal_(torch.zeros(1, 1, width), std=0.02), requires_grad=mask > 0)
        self.blocks = nn.ModuleList(Block(width, heads, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(width * patches, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim, eps=2e-5),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        masked = self.training and self.mask > 0
        if masked:
            batch, patches, width = x.shape
            shuffled = torch.rand(batch, patches, device=x.device).argsort(dim=1)
            shown = shuffled[:, : int(patches * (1 - self.mask)), None].expand(-1, -1, width)
            x = x.gather(1, shown)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if masked:
            x = self.mask_token.to(x.dtype).expand(batch, patches, width).scatter(1, shown, x)
        with torch.autocast(x.device.type, enabled=False):
            return self.feature(x.flatten(1).float())


Patch = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


def _register(name: str, width: int, depth: int) -> None:
    @register(name)
    def build(
        embedding_dim: Annotated[int, Field(ge=1)],
        image_size: tuple[int, int],
        patch: Patch = 9,
        drop_path: Share = 0.1,
        mask: Share = 0.1,
    ) -> nn.Module:
        return VisionTransformer(
            embedding_dim,
            image_size,
            width=width,
            depth=depth,
            heads=8,
            patch=patch,
            drop_path=drop_path,
            mask=mask,
        )


_register("vit_t", 256, 12)
_register("vit_s", 512, 12)
_register("vit_b", 512, 24)
_register("vit_l", 768, 24)
