"""Activation checkpointing: a block's activations are computed again in the backward pass, not kept until then."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

from torch import is_grad_enabled, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ...data.errors import UsageError


def recompute(network: nn.Module) -> None:
    """Lets every repeated block of the network (Chen et al. 2016) keep its input alone.

    Outputs, gradients and BatchNorm's statistics stay the same; the forward pass is done twice.

    Raises:
        UsageError: the network has no blocks.
    """
    blocks = list(repeated(network))
    if not blocks:
        raise UsageError("backbone.recompute: this backbone has no repeated blocks (in a Sequential or ModuleList)")
    for block in blocks:
        # A method, so that a copy of the network gets one of its own.
        block.forward = MethodType(_recomputed, block)


def repeated(module: nn.Module) -> Iterator[nn.Module]:
    """The smallest members of Sequentials and ModuleLists that have several layers: residual blocks, transformer
    blocks."""
    for child in module.children():
        inner = list(repeated(child))
        if inner:
            yield from inner
        elif isinstance(module, nn.Sequential | nn.ModuleList) and _layers(child) > 1:
            yield child


def _layers(module: nn.Module) -> int:
    return sum(any(True for _ in one.parameters(recurse=False)) for one in module.modules())


def _recomputed(self: nn.Module, *inputs: Any, **named: Any) -> Any:
    forward = type(self).forward
    if not self.training or not is_grad_enabled():
        return forward(self, *inputs, **named)
    return checkpoint(forward, self, *inputs, use_reentrant=False, context_fn=partial(_contexts, self), **named)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), _without_statistics(block)


@contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """The second time BatchNorm sees a batch it must not count it again."""
    norms = [one for one in block.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    counted = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, number) in zip(norms, counted, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, number
