"""The head's arithmetic in plain torch: the reference of every faster kernel.

Shapes: B samples that meet the negatives, K sampled classes of this rank, D the dimension. ``columns`` [B] holds the
place of each sample's own class among the K, or −1 where another rank has it: that entry is no negative.
"""

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


def log_sum_exp(cosines: Tensor, columns: Tensor, scale: float) -> Tensor:
    """log Σ exp(scale·z) over the negatives, float64 [B]; −∞ where there is none.

    Args:
        cosines: z, [B, K]; the entry of each sample's own class is set to −∞ in place.
    """
    _exclude(cosines, columns, -torch.inf)
    if cosines.shape[1] == 0:
        return torch.full((len(cosines),), -torch.inf, dtype=torch.float64, device=cosines.device)
    largest = cosines.amax(dim=1, keepdim=True).clamp_min(-2.0)  # −∞ where the own class is alone
    return (((cosines - largest) * scale).exp_().sum(dim=1, dtype=torch.float64).log()) + scale * largest[:, 0].double()


def log_sum_exp_backward(cosines: Tensor, total: Tensor, gradient: Tensor, scale: float) -> Tensor:
    """∂loss/∂z [B, K], in place of the cosines that ``log_sum_exp`` left behind: ∂loss/∂ℓ · scale · exp(scale·z − ℓ).

    Args:
        total: ℓ over all ranks, float64 [B].
        gradient: ∂loss/∂ℓ, float64 [B].
    """
    shift = total.clamp_min(-1e4).to(cosines.dtype)[:, None]  # no negative at all: exp(−∞) stays 0
    return cosines.mul_(scale).sub_(shift).exp_().mul_((gradient * scale).to(cosines.dtype)[:, None])


def sum_squares(cosines: Tensor, columns: Tensor) -> Tensor:
    """Σ z² over the negatives, float64 [B]; the entry of each sample's own class is set to 0 in ``cosines``."""
    _exclude(cosines, columns, 0.0)
    return cosines.square().sum(dim=1, dtype=torch.float64)


def sum_squares_backward(cosines: Tensor, gradient: Tensor) -> Tensor:
    """∂loss/∂z = 2·z·∂loss/∂q [B, K], in place."""
    return cosines.mul_((2.0 * gradient).to(cosines.dtype)[:, None])


def _exclude(cosines: Tensor, columns: Tensor, value: float) -> None:
    here = columns >= 0
    if cosines.shape[1]:
        # A sample whose class lives elsewhere writes back what stands in its first column.
        place = columns.clamp_min(0)[:, None]
        cosines.scatter_(1, place, torch.where(here[:, None], value, cosines.gather(1, place)))
