"""The three functions that the objectives are made of, exact and with slopes that stay finite."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), exact everywhere; torch's own cuts off above 20, an error of 2·10⁻⁹."""
    return -logsigmoid(-x)


def psi(theta: Tensor) -> Tensor:
    """ψ(t) = (−1)^j·cos t − 2j with j = ⌊t/π⌋: the cosine on [0, π], continued so that it keeps falling beyond π."""
    turns = torch.floor(theta.detach() / math.pi)
    sign = 1.0 - 2.0 * torch.remainder(turns, 2.0)
    return sign * torch.cos(theta) - 2.0 * turns


def angle(cosine: Tensor) -> Tensor:
    """arccos with a bounded slope.

    The true slope −1/sin θ is infinite at θ = 0 and π, where the gradient that it multiplies, the part of the center
    at right angles to the embedding, is zero. Below sin θ = 10⁻⁴ the slope stays at −10⁴, and the product is zero.
    """
    return _Angle.apply(cosine)  # type: ignore[return-value]


class _Angle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cosine: Tensor) -> Tensor:
        theta = torch.acos(cosine.clamp(-1.0, 1.0))
        ctx.save_for_backward(theta)
        return theta

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (theta,) = ctx.saved_tensors
        return -grad / torch.sin(theta).clamp_min(1e-4)
