"""Rows of length 1."""

import torch
from torch import Tensor

_SHORTEST = 1e-10  # times the largest p = e^64 its inverse still fits float32


def inverse_norms(rows: Tensor) -> Tensor:
    """1/‖row‖ of rows [N, D], [N, 1]; 0 for a row shorter than 10⁻¹⁰, which counts as zero."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(norms > _SHORTEST, norms.reciprocal(), 0.0)


def normalize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, D] scaled to length 1, and their inverse norms [N, 1]; a row of zeros stays so, with inverse norm 0."""
    inverse = inverse_norms(rows)
    return rows * inverse, inverse


def normalize_backward(gradient: Tensor, normalized: Tensor, inverse: Tensor) -> Tensor:
    """The gradient by the rows themselves, from the one by the normalised rows: (g − (g·n) n)/‖row‖.

    In float64, and with n's own length, 1 to a few roundings only: the part of g along n, which is to vanish, may be a
    hundred times longer than what stays (P2SGrad's is).
    """
    wide, unit = gradient.double(), normalized.double()
    along = (wide * unit).sum(dim=1, keepdim=True) / unit.square().sum(dim=1, keepdim=True).clamp_min(0.5)
    return ((wide - along * unit) * inverse).to(gradient.dtype)
