"""One step of the head, in seven parts: from embeddings and labels to the loss and the gradients."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import device as devices
from .kernels.rows import OwnClasses, SampledRows, computed_dtype, normalize, normalize_backward
from .row_gradient import RowGradient, StagedGradient, StepGradient
from .sampling import ClassSample, LastSample, negative_rows, sample_batch, sample_classes
from .side_stream import SideStream
from .storage import TakenRows

if TYPE_CHECKING:
    from .head import PartialFC


class HeadLoss(torch.autograd.Function):
    """The mean loss over the global batch; its backward leaves the gradients as ``PartialFC`` says."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, weight: Tensor, labels: Tensor, head: "PartialFC", backward: bool
    ) -> Tensor:
        objective = head.objective.at(head.steps)
        if head.side_stream is not None:
            head.side_stream.join()
        dtype = computed_dtype(weight.dtype)
        # ① the global batch
        batch, labels = head.exchange.gather_batch(embeddings.detach(), labels)
        _check_labels(head, labels)
        unit, inverse = normalize(batch.to(dtype))  # [B, D], [B, 1]
        # ② the sample
        copied = head.staged is not None and head.training and head.sample_rate < 1.0
        where_computed = head.staged.centers if head.staged is not None and copied else weight
        fused = objective.fused_kernel(where_computed, head.compute_dtype, head.budget)
        sample, part = draw_sample(head, labels, fixed=fused is not None and not copied)
        rows, taken = _rows(head, sample)
        everyone = slice(None) if part is None else part
        # ③ two numbers per sample
        part_unit = unit[everyone]
        size = len(part_unit)
        kernel = fused or objective.kernel(size, head.embedding_dim, len(rows), head.compute_dtype, head.budget)
        own = OwnClasses(sample.columns)
        # The M samples whose class this rank has, one in W; with the fused kernels all, as the host must not ask.
        here = slice(None) if fused is not None else own.samples
        columns = own.columns[here]
        own_rows = unit.new_zeros(len(columns), head.embedding_dim)  # [M, D]
        if len(rows):
            own_rows = torch.where((columns >= 0)[:, None], normalize(rows.at(columns.clamp_min(0)))[0], 0.0)
        numbers = torch.zeros(2, len(labels), dtype=torch.float64, device=unit.device)
        numbers[0, here] = (unit[here].double() * own_rows.double()).sum(dim=1)
        part_own = own if part is None else OwnClasses(own.columns[part])
        numbers[1, everyone] = kernel.forward(part_unit, rows, part_own, backward=backward)
        # ④ … of all ranks
        target, negatives = head.exchange.sum(numbers)
        negatives = kernel.finish(negatives[everyone])
        # ⑤ the loss, and its slopes by the two numbers
        with torch.set_grad_enabled(backward):
            target.requires_grad_(backward)
            negatives.requires_grad_(backward)
            loss = objective.intra(target).mean() + objective.inter(target[everyone], negatives).mean()
        if head.training:
            head.steps += 1
        if not backward:
            return loss.to(dtype)
        target_slope, negatives_slope = torch.autograd.grad(loss, (target, negatives), materialize_grads=True)
        ctx.head, ctx.kernel, ctx.rows, ctx.own, ctx.part, ctx.here = head, kernel, rows, own, part, here
        ctx.kernel_is_fused, ctx.draw, ctx.taken = fused is not None, sample.draw, taken
        ctx.embedding_dtype = embeddings.dtype
        ctx.negatives = negatives.detach(), negatives_slope
        ctx.save_for_backward(unit, inverse, own_rows, target_slope)
        return loss.detach().to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RuntimeError("the head's gradient has no gradient of its own: call backward without create_graph")
        with devices.own_precision(grad.device):
            return _gradients(ctx, grad), None, None, None, None


def _gradients(ctx: Any, grad: Tensor) -> Tensor:
    head: PartialFC = ctx.head
    unit, inverse, own_rows, target_slope = ctx.saved_tensors
    negatives, negatives_slope = ctx.negatives
    unit_grad, unit_rows_grad = ctx.kernel.backward(negatives, negatives_slope * grad.double())  # [B', D]
    own_slope = (target_slope * grad.double()).to(unit.dtype)[ctx.here, None]  # [M, 1]
    # ⑥ ∂loss/∂embeddings, of all ranks' classes, to each rank its own samples
    if ctx.part is not None:
        unit_grad = torch.zeros_like(unit).index_copy_(0, ctx.part, unit_grad)  # [B, D]
    unit_grad[ctx.here] += own_slope * own_rows
    mine_grad, broken = head.exchange.sum_and_scatter(unit_grad, ~torch.isfinite(grad))
    size = len(mine_grad)
    mine = slice(head.exchange.rank * size, (head.exchange.rank + 1) * size)
    embedding_grad = normalize_backward(mine_grad, unit[mine], inverse[mine]) * head.exchange.world_size
    embedding_grad = embedding_grad.to(ctx.embedding_dtype)
    if not ctx.needs_input_grad[1]:  # frozen centers
        return embedding_grad
    # ⑦ ∂loss/∂rows, computed in the row update
    slopes = own_slope * unit[ctx.here]
    gradient: RowGradient
    if ctx.kernel_is_fused:
        from .kernels.fused.gradient import FusedGradient

        padded = ctx.taken is None
        gradient = FusedGradient(unit_rows_grad, ctx.own.columns, slopes, ctx.draw, padded=padded)
    else:
        gradient = StepGradient(ctx.rows, unit_rows_grad, ctx.own, slopes)
    if ctx.taken is not None:
        gradient = StagedGradient(gradient, ctx.taken, ctx.rows)
    head.add_gradient(gradient, torch.where(broken > 0, torch.nan, grad))
    assert head.gradient_scale.grad is not None
    head.side_stream = head.side_stream or SideStream(unit.device)
    head.side_stream.mark(head.gradient_scale.grad)
    return embedding_grad


def draw_sample(head: "PartialFC", labels: Tensor, *, fixed: bool) -> tuple[ClassSample, Tensor | None]:
    """The classes and the part of the batch [B'] (None for all) of this step."""
    class_rate, batch_rate = (head.sample_rate, head.batch_rate) if head.training else (1.0, 1.0)
    seed, step, size, device = head.seed, head.steps, len(labels), labels.device
    known, negatives = labels, None
    if head.staged is not None:
        known = labels.cpu()  # where the rows are copied from
        negatives = head.staged.fetched((step, class_rate)) if class_rate < 1.0 else None
    classes = sample_classes(known, head.shard, rate=class_rate, seed=seed, step=step, fixed=fixed, negatives=negatives)
    classes = replace(classes, columns=classes.columns.to(device))
    batch = sample_batch(size, rate=batch_rate, seed=seed, step=step, device=device, fixed=fixed)
    head.last_sample = LastSample(classes, torch.arange(size, device=device) if batch is None else batch)
    return classes, batch


def _rows(head: "PartialFC", sample: ClassSample) -> tuple[SampledRows, TakenRows | None]:
    """The step's rows: the stored ones, or a copy of them; the reading of the next step's begins."""
    weight, staged = head.weight.detach(), head.staged
    if staged is None:
        return SampledRows(weight, sample.rows), None
    if sample.rows is None:  # all of them, a block at a time
        staged.settle()
        return SampledRows(weight, None, head.device), None
    taken = staged.take(sample.rows, spare=len(sample.columns))
    shard, seed, step, rate = head.shard, head.seed, head.steps + 1, head.sample_rate
    staged.fetch((step, rate), lambda: negative_rows(shard, rate=rate, seed=seed, step=step))
    return SampledRows(taken.parts[0], taken.index), taken


def _check_labels(head: "PartialFC", labels: Tensor) -> None:
    """Every rank sees all labels, so that all of them refuse a wrong one together and none is left waiting."""
    wrong = (labels < 0) | (labels >= head.num_classes)
    if not devices.host_sees(labels.device):
        message = f"a label lies outside [0, {head.num_classes})"
        torch._assert_async(~wrong.any(), message)
    elif wrong.any():
        place = int(wrong.nonzero()[0])
        rank, position = divmod(place, len(labels) // head.exchange.world_size)
        raise ValueError(
            f"label {int(labels[place])} (sample {position} of rank {rank}) lies outside [0, {head.num_classes})"
        )
