"""The walk of a row optimizer over the rows of a step: a block of rows at a time, in place, and no other row."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from . import device as devices
from .kernels import native
from .kernels.blocked import block_rows
from .kernels.rows import stored_rows
from .row_gradient import GradientSum, RowGradient, project


class RowRule(Protocol):
    """What an optimizer does to rows.

    Attributes:
        step_rows: ``step_rows(rows: RowStep, weight, state)`` does the same as ``update`` for some rows of the whole
            shard's matrix [N, D] and its state [N, ...], in one pass; None where no such pass exists for the rule.
    """

    step_rows: Any

    def update(self, weight: Tensor, gradient: Tensor, state: list[Tensor]) -> None:
        """Steps rows [n, D] and their state [n, ...] in place; the gradient [n, D] may be overwritten."""
        ...


@runtime_checkable
class AppliesItself(Protocol):
    """A gradient with an update loop of its own."""

    def adds(self, others: Sequence[RowGradient]) -> bool:
        """Whether it can apply the sum with these too."""
        ...

    def apply(
        self, others: Sequence[Any], tensors: Sequence[Tensor], rule: RowRule, factor: Tensor, broken: Tensor
    ) -> None: ...


def apply(
    gradients: Sequence[RowGradient], tensors: Sequence[Tensor], rule: RowRule, factor: Tensor, broken: Tensor
) -> None:
    """One step.

    Args:
        gradients: of the rows, one for each backward pass; they add up.
        tensors: the shard's centers [N, D], then their state [N, ...].
        rule: what is done to them.
        factor: multiplies the gradient, [].
        broken: bool []; on a GPU, where the host does not know it, a step that is broken leaves all as it was.
    """
    gradient, *others = gradients
    if isinstance(gradient, AppliesItself) and gradient.adds(others):
        gradient.apply(others, tensors, rule, factor, broken)
        return
    weight, *state = tensors
    compiled = rule.step_rows if native.supports(weight) else None
    number = 1.0 if compiled is None else float(factor)
    size = block_rows(weight)
    if others:
        gradient = GradientSum(gradients, size)
    for start in range(0, len(gradient), size):
        stop = min(start + size, len(gradient))
        if compiled is not None:
            rows = stored_rows(weight, gradient.index, start, stop) if gradient.needs_rows else None
            values = gradient.raw_block(start, stop, rows).to(weight.dtype).contiguous()
            step = native.CompiledStep(gradient.index, start, stop, values, gradient.inverse, number)
            compiled(step, weight, state)
        else:
            _by_torch(gradient, start, stop, tensors, rule, factor, broken)


def _by_torch(
    gradient: RowGradient,
    start: int,
    stop: int,
    tensors: Sequence[Tensor],
    rule: RowRule,
    factor: Tensor,
    broken: Tensor,
) -> None:
    weight, *state = [stored_rows(tensor, gradient.index, start, stop) for tensor in tensors]
    values = gradient.raw_block(start, stop, weight)
    if gradient.inverse is not None:
        project(values, weight, gradient.inverse[start:stop])
    values.mul_(factor)
    on_device = not devices.host_sees(broken.device)  # whether the step is broken is known there alone
    before = [weight.clone(), *(one.clone() for one in state)] if on_device else []
    rule.update(weight, values, state)  # in place, where these are views
    after = [weight, *state]
    if on_device:
        after = [torch.where(broken, old, new) for old, new in zip(before, after, strict=True)]
    for tensor, rows in zip(tensors, after, strict=True):
        if gradient.index is not None:
            tensor.index_copy_(0, gradient.index[start:stop], rows)
        elif on_device:
            tensor[start:stop] = rows
