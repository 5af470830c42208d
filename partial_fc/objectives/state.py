"""What the head keeps for its objective, and gives it to see in a step."""

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..permutation import hash64
from .base import Numbers, Objective

_ONE_LENGTH = 0.01  # norms whose deviation is less of their mean


class ObjectiveState(nn.Module):
    """An objective's numbers, each a tensor []: learned ones are parameters, moving averages float64 buffers.

    They are the same on every rank, since they follow from the global batch alone.

    Args:
        objective: whose they are.
        classes: how many a step uses.
        dtype: of the parameters.
    """

    def __init__(self, objective: Objective, classes: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        for name, first in objective.first_state(classes).items():
            value = torch.tensor(first, dtype=torch.float64, device=device)
            if name in objective.learned:
                self.register_parameter(name, nn.Parameter(value.to(dtype)))
            else:
                self.register_buffer(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ObjectiveState":
        """What ``to``, ``float`` and the like do: averages stay float64."""
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, value in kept.items():
            self._buffers[name] = value.to(self.get_buffer(name).device)
        return self

    def learned(self) -> list[nn.Parameter]:
        """The parameters, in the order of their names."""
        return [one for _, one in sorted(self.named_parameters())]

    def numbers(self, objective: Objective, batch: Tensor, *, seed: int, step: int, training: bool) -> Numbers:
        """What the objective sees before any cosine is known.

        Args:
            batch: the global batch's embeddings [B, D] as they came.
        """
        parts: dict[str, Tensor] = {}
        if "norm" in objective.sees:
            parts["norm"] = torch.linalg.vector_norm(batch, dim=1, dtype=torch.float64)
            if training and step == 0:
                _warn_of_one_length(objective, parts["norm"])
        if "noise" in objective.sees:
            noise = torch.zeros(len(batch), dtype=torch.float64, device="cpu")
            if training:  # by the host, so that it is the same on every device
                key = hash64(hash64(seed, 4), step) & 0x7FFFFFFFFFFFFFFF
                noise.normal_(generator=torch.Generator("cpu").manual_seed(key))
            parts["noise"] = noise.to(batch.device, non_blocking=True)
        state = {name: value.detach().double() for name, value in (*self.named_buffers(), *self.named_parameters())}
        return Numbers(batch.new_full((len(batch),), torch.nan, dtype=torch.float64), state=state, **parts)

    @torch.no_grad()
    def update(self, objective: Objective, of: Numbers, *, training: bool) -> Numbers:
        """With the averages as the batch has moved them. A number that is not finite moves none."""
        if not training:
            return of
        new: Mapping[str, Tensor] = objective.update(of)
        for name, value in new.items():
            kept = self.get_buffer(name)
            kept.copy_(torch.where(torch.isfinite(value), value, kept))
        moved = {name: self.get_buffer(name).double() for name in new}
        return Numbers(of.target, of.negatives, of.norm, of.noise, {**of.state, **moved})


def _warn_of_one_length(objective: Objective, norm: Tensor) -> None:
    """On a GPU the host waits for it, in the first step alone."""
    if len(norm) > 1 and bool(norm.std() < _ONE_LENGTH * norm.mean()):
        warnings.warn(
            f"{type(objective).__name__} sees the embeddings' norms, which hardly differ ({float(norm.mean()):.4g} ± "
            f"{float(norm.std()):.2g}): the backbone ends with a layer that normalises them",
            stacklevel=2,
        )
