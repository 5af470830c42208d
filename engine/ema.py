"""The average of a network's weights over the steps, which is often better than the last ones."""

import copy

import torch
from torch import Tensor, nn


class Average:
    """The exponential moving average of a network's weights and BatchNorm statistics, float32.

    θ' ← θ' + (1 − d)·(θ − θ'), with d = min(decay, (1 + t)/(10 + t)) in step t, from 1: at the beginning, while the
    weights move fast, it reaches back over few steps (as TensorFlow's ExponentialMovingAverage does with num_updates).

    Attributes:
        network: a copy with these weights.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay = decay
        self._own = _tensors(self.network)

    def update(self, network: nn.Module, step: int) -> None:
        """Takes in the weights after that step. A step that was skipped has changed nothing, and does no harm."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        new = _tensors(network)
        floating = [place for place, own in enumerate(self._own) if own.is_floating_point()]
        others = [place for place, own in enumerate(self._own) if not own.is_floating_point()]
        with torch.no_grad():
            torch._foreach_lerp_([self._own[place] for place in floating], [new[place] for place in floating], weight)
            if others:  # how many batches BatchNorm has seen
                torch._foreach_copy_([self._own[place] for place in others], [new[place] for place in others])

    def restart(self, network: nn.Module) -> None:
        """Begins anew, from these weights."""
        self.network.load_state_dict(network.state_dict())


def _tensors(network: nn.Module) -> list[Tensor]:
    """Weights and buffers, each once, also where modules share them."""
    return [*(parameter.data for parameter in network.parameters()), *network.buffers()]
