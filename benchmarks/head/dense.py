"""The straightforward head, sharded: all logits, their gradients, and a dense gradient of the whole matrix."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...partial_fc.centers import ClassShard

SCALE, MARGIN = 64.0, 0.35


class DenseHead(nn.Module):
    """CosFace over all classes, exact; each rank holds its classes' logits [B, rows] and lets autograd do the rest.

    Args:
        num_classes: C, over all ranks.
        embedding_dim: D.
        dtype: of the product.
        device: of the centers.
    """

    def __init__(self, num_classes: int, embedding_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.shard = ClassShard.of(num_classes, dist.get_rank(), dist.get_world_size())
        self.weight = nn.Parameter(torch.randn(self.shard.rows, embedding_dim, device=device) * 0.01)
        self.gradient_scale = nn.Parameter(torch.ones((), device=device))
        """From its ``grad`` the training step sees whether the gradient is finite, as with ``PartialFC``."""
        self.sample_rate = 1.0
        self.dtype = dtype

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the global batch, []; embeddings [b, D], labels int64 [b]."""
        batch, everyone = _Gather.apply(embeddings.to(self.weight.dtype)), _gathered(labels)
        unit, rows = nn.functional.normalize(batch), nn.functional.normalize(self.weight)
        cosines = (unit.to(self.dtype) @ rows.to(self.dtype).T).to(rows.dtype)
        mine = ((everyone >= self.shard.start) & (everyone < self.shard.stop)).nonzero()[:, 0]
        place = mine, everyone[mine] - self.shard.start
        logits = SCALE * cosines.index_put(place, cosines[place] - MARGIN)
        largest = logits.detach().amax(dim=1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)  # a shift that all ranks agree on
        total = _Sum.apply(torch.exp(logits - largest[:, None]).sum(dim=1))
        target = _Sum.apply(torch.zeros_like(largest).index_put((mine,), logits[place]))
        return (total.log() + largest - target).mean() * self.gradient_scale


class _Gather(torch.autograd.Function):
    """The global batch; backward adds up all ranks' parts of the gradient, times W for DistributedDataParallel."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _gathered(tensor.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return grad.chunk(world_size)[rank] * world_size


class _Sum(torch.autograd.Function):
    """The sum over the ranks; every rank goes on with the same number, so each takes that number's gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        summed = tensor.detach().clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


def _gathered(tensor: Tensor) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
