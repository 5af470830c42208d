"""Backbones: networks from images [b, 3, H, W] to embeddings [b, D]. docs/backbones.md shows how to add one."""

from . import iresnet, mobilefacenet, small, vit  # noqa: F401  (importing a module registers what is in it)
from .registry import backbone_names, build_backbone, register

__all__ = ["backbone_names", "build_backbone", "register"]
