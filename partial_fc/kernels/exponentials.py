"""p = exp(scale·z) of a block of rows, and its sum over them: the one pass over the products of a block."""

import torch
from torch import Tensor

from . import native

_Own = tuple[Tensor, Tensor]


def exponentials(
    products: Tensor, inverse: Tensor, scale: float, ceiling: float, own: _Own | None, total: Tensor
) -> None:
    """In place, from w·x̂ to p/‖w‖.

    Args:
        products: w·x̂ [n, B] of stored rows with normalised embeddings; p/‖w‖ when it returns, where p = exp(scale·z),
            z = w·x̂/‖w‖, and p = 0 for negatives with z > ``ceiling`` and for each sample's own class.
        inverse: 1/‖w‖ [n, 1].
        scale: at most 64, so that p needs no shift.
        ceiling: infinity where no negative is left out.
        own: the own classes' places in the block and in the batch, int64 [m] each; None where there are none.
        total: float64 [B], to which Σ p over the rows is added.
    """
    if native.supports(products):
        if own is not None:
            products[own] = -torch.inf
        native.exponentials(products, inverse, scale, ceiling, total)
        return
    products.mul_(inverse * scale)
    if ceiling < torch.inf:
        products.masked_fill_(products > ceiling * scale, -torch.inf)
    products.exp_()
    if own is not None:
        products[own] = 0.0
    total += products.sum(dim=0)
    products.mul_(inverse)
