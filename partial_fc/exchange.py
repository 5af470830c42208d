"""Every collective of the head, and the one place that knows what this torch version calls them.

A step has three, whatever the number of ranks: the batch is gathered, two numbers per sample are summed, the
embeddings' gradients are summed and scattered. Objectives with hard negatives have one more, of z_y or of the largest
cosines. With one rank there is nothing to exchange and nothing is called.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed both, and warns when the old names are called; before 2.13 the new names do not exist.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Exchange:
    """The ranks that share the centers: a process group, or this process alone where torch.distributed is not set up.

    Args:
        group: the ranks; the default group when None.
        payload_dtype: what embeddings and their gradients travel in; each in its own dtype when None.
    """

    def __init__(self, group: ProcessGroup | None = None, payload_dtype: torch.dtype | None = None) -> None:
        self.payload_dtype = payload_dtype
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1

    def __deepcopy__(self, _: dict) -> "Exchange":
        return self  # a copy of the head exchanges with the same ranks

    def gather_batch(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The global batch in rank order: embeddings [b, D] → [B, D] and labels [b] int64 → [B], in one collective."""
        if self.world_size == 1:
            return embeddings, labels
        embeddings = embeddings.to(self.payload_dtype or embeddings.dtype)
        rows, dim = embeddings.shape
        width = dim * embeddings.element_size()  # bytes
        payload = torch.cat([embeddings.contiguous().view(torch.uint8), labels.view(torch.uint8).view(rows, 8)], dim=1)
        gathered = payload.new_empty(self.world_size * rows, width + 8)
        _all_gather(gathered, payload, group=self.group)
        return (
            gathered[:, :width].contiguous().view(embeddings.dtype),
            gathered[:, width:].contiguous().view(torch.int64).view(-1),
        )

    def gather(self, values: Tensor) -> Tensor:
        """Those of every rank, equally many: [...] → [W, ...]."""
        if self.world_size == 1:
            return values[None]
        gathered = values.new_empty(self.world_size, *values.shape)
        _all_gather(gathered.view(-1), values.contiguous().view(-1), group=self.group)
        return gathered

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(numbers, group=self.group)
        return numbers

    def sum_and_scatter(self, gradients: Tensor, broken: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the ranks, and gives each its own slice, in one collective.

        Args:
            gradients: this rank's part of every sample's gradient, [B, D].
            broken: whether something else on this rank is not finite, bool [].

        Returns:
            The summed gradients of this rank's own samples [b, D]; and on how many ranks something was not finite,
            these parts included, as a number [].
        """
        if self.world_size == 1:
            return gradients, (broken | ~torch.isfinite(gradients).all()).to(gradients.dtype)
        size = gradients.numel() // self.world_size
        payload = gradients.new_empty(self.world_size, size + 1, dtype=self.payload_dtype or gradients.dtype)
        payload[:, :size] = gradients.view(self.world_size, size)
        payload[:, size] = broken | ~torch.isfinite(payload[:, :size]).all()
        own = payload.new_empty(size + 1)
        _reduce_scatter(own, payload.view(-1), group=self.group)
        own = own.to(gradients.dtype)
        return own[:size].view(-1, gradients.shape[1]), own[size]
