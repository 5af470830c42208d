"""Rows of length 1."""

import torch
from torch import Tensor


def normalize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, D] scaled to length 1, and their inverse norms [N, 1]; a row of zeros stays so, with inverse norm 0."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    inverse = torch.where(norms > torch.finfo(rows.dtype).tiny ** 0.5, norms.reciprocal(), 0.0)
    return rows * inverse, inverse


def normalize_backward(gradient: Tensor, normalized: Tensor, inverse: Tensor) -> Tensor:
    """The gradient by the rows themselves, from the one by the normalised rows: (g − (g·n) n)/‖row‖."""
    along = (gradient * normalized).sum(dim=1, keepdim=True)
    return (gradient - along * normalized) * inverse
