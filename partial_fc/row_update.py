"""The walk of a row optimizer over the rows of a step: a block of rows at a time, in place, and no other row."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from . import device as devices
from .kernels import native
from .kernels.rounding import Rounding
from .kernels.rows import block_rows, computed_dtype, stored_rows
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
    gradients: Sequence[RowGradient],
    tensors: Sequence[Tensor],
    rule: RowRule,
    factor: Tensor,
    broken: Tensor,
    rounding: Rounding | None = None,
    sub_centers: int = 1,
    *,
    dense: bool = False,
) -> None:
    """One step.

    Args:
        gradients: of the rows, one for each backward pass; they add up.
        tensors: the shard's centers [N, D], then their state [N, ...].
        rule: what is done to them.
        factor: multiplies the gradient, [].
        broken: bool []; on a GPU, where the host does not know it, a step that is broken leaves all as it was.
        rounding: of tensors in bfloat16, None where there are none; without ids where these are the gradient's places.
        sub_centers: rows of a class, which are never in two blocks.
        dense: whether rows without a gradient are stepped too.
    """
    gradient, *others = gradients
    if not dense and isinstance(gradient, AppliesItself) and gradient.adds(others):
        gradient.apply(others, tensors, rule, factor, broken)
        return
    weight, *state = tensors
    here = weight.device == factor.device
    # A row of one number has its momentum apart, in float32, which the passes over bfloat16 do not expect.
    compiled = rule.step_rows if here and native.supports(weight) and weight.shape[1] > 1 else None
    number = 1.0 if compiled is None else float(factor)
    size = block_rows(weight, factor.device, sub_centers)
    if others or dense:
        gradient = GradientSum(gradients, size, len(weight) if dense else None)
    if rounding is not None and rounding.ids is None and gradient.index is not None:
        rounding = replace(rounding, ids=gradient.index)
    for start in range(0, len(gradient), size):
        stop = min(start + size, len(gradient))
        if compiled is not None:
            dtype = computed_dtype(weight.dtype)
            rows = stored_rows(weight, gradient.index, start, stop).to(dtype) if gradient.needs_rows else None
            values = gradient.raw_block(start, stop, rows).to(dtype).contiguous()
            step = native.CompiledStep(gradient.index, start, stop, values, gradient.inverse, number, rounding)
            compiled(step, weight, state)
        else:
            _by_torch(gradient, start, stop, tensors, rule, factor, broken, rounding)


def _by_torch(
    gradient: RowGradient,
    start: int,
    stop: int,
    tensors: Sequence[Tensor],
    rule: RowRule,
    factor: Tensor,
    broken: Tensor,
    rounding: Rounding | None,
) -> None:
    stored = [stored_rows(tensor, gradient.index, start, stop) for tensor in tensors]
    weight, *state = [rows.to(factor.device, computed_dtype(rows.dtype)) for rows in stored]
    values = gradient.raw_block(start, stop, weight)
    if gradient.inverse is not None:
        project(values, weight, gradient.inverse[start:stop])
    values.mul_(factor)
    on_device = not devices.host_sees(broken.device)  # whether the step is broken is known there alone
    before = [weight.clone(), *(one.clone() for one in state)] if on_device else []
    rule.update(weight, values, state)  # in place, where these are views
    after = [weight, *state]
    for part, (tensor, rows) in enumerate(zip(tensors, stored, strict=True)):
        new = after[part]
        if tensor.dtype == torch.bfloat16:
            assert rounding is not None
            new = rounding.rounded(new, start, part)
        if on_device:
            new = torch.where(broken, before[part].to(new.dtype), new)
        if gradient.index is not None:
            tensor.index_copy_(0, gradient.index[start:stop], new)
        elif new is not rows:
            tensor[start:stop] = new
