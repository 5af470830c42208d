"""One step of the head, in seven parts: from embeddings and labels to the loss and the gradients."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import device as devices
from .kernels import KernelSetup
from .kernels.hard import largest_cosines
from .kernels.rows import OwnClasses, SampledRows, computed_dtype, nearest_of_own, normalize, normalize_backward
from .row_gradient import RowGradient, StagedGradient, StepGradient
from .sampling import ClassSample, LastSample, negative_rows, sample_batch, sample_classes
from .side_stream import SideStream
from .storage import TakenRows

if TYPE_CHECKING:
    from .head import PartialFC


class HeadLoss(torch.autograd.Function):
    """The mean loss over the global batch; its backward leaves the gradients as ``PartialFC`` says.

    ``learned`` are the head's parameters that the objective learns, in the order of their names.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        labels: Tensor,
        head: "PartialFC",
        backward: bool,
        *learned: Tensor,
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
        fused = head.sub_centers == 1 and objective.fuses(where_computed, head.compute_dtype)
        sample, part = draw_sample(head, labels, fixed=fused and not copied)
        rows, taken = _rows(head, sample)
        everyone = slice(None) if part is None else part
        # ③ numbers of each sample: of its own class, the nearest of its rows …
        classes = OwnClasses(sample.columns)
        own = nearest_of_own(classes, rows, unit, head.sub_centers)
        # The M samples whose class this rank has, one in W; with the fused kernels all, as the host must not ask.
        here = slice(None) if fused else own.samples
        own_rows, of_own = _of_own(head, rows, unit, labels, own.columns, here)  # [M, D], [1 or 2, B]
        of = head.objective_state.numbers(objective, batch, seed=head.seed, step=head.steps, training=head.training)
        # … and of the negatives; some objectives must know the batch's z_y, or the nearest negatives, before
        early = objective.hard_by == "target"
        if early:
            of_own = head.exchange.sum(of_own)
            of = head.objective_state.update(objective, replace(of, target=of_own[0]), training=head.training)
        part_unit, part_classes = unit[everyone], classes if part is None else OwnClasses(classes.columns[part])
        largest = None
        if objective.hard_by == "largest":
            count = objective.top_k + 1
            found = largest_cosines(part_unit, rows, part_classes, count, head.compute_dtype, head.sub_centers)
            largest = head.exchange.gather(found).transpose(0, 1).flatten(1).topk(count).values.double()
        state = {name: of.state[name].requires_grad_(backward) for name in sorted(objective.learned)}
        setup = KernelSetup(
            batch=len(part_unit),
            dim=head.embedding_dim,
            rows=len(rows),
            compute_dtype=head.compute_dtype,
            budget=head.budget,
            hard=objective.hard(of.at(everyone), largest),
            state={**of.state, **state},
            sub_centers=head.sub_centers,
            fused=fused,
        )
        with torch.set_grad_enabled(backward):
            kernel = objective.kernel(setup)
        sums = unit.new_zeros(kernel.sums, len(labels), dtype=torch.float64)
        sums[:, everyone] = kernel.forward(part_unit, rows, part_classes, backward=backward)
        # ④ … of all ranks
        if early:
            sums = head.exchange.sum(sums)
        else:
            of_own, sums = head.exchange.sum(torch.cat([of_own, sums])).split([len(of_own), len(sums)])
            of = head.objective_state.update(objective, replace(of, target=of_own[0]), training=head.training)
        negatives = kernel.finish(sums[:, everyone])
        # ⑤ the loss, and its slopes by the numbers
        with torch.set_grad_enabled(backward):
            leaves = [of.target, negatives, of.norm, *state.values()]
            for leaf in leaves:
                leaf.requires_grad_(backward)
            met = replace(of.at(everyone), negatives=kernel.attach(negatives), state={**of.state, **state})
            intra, inter = objective.intra(replace(of, state=met.state)), objective.inter(met)
            if head.class_weights is not None:
                intra, inter = intra * of_own[1], inter * of_own[1, everyone]
            loss = intra.mean() + inter.mean()
        if head.training:
            head.steps += 1
        if not backward:
            return loss.to(dtype)
        target_slope, negatives_slope, norm_slope, *learned_slopes = torch.autograd.grad(
            loss, leaves, materialize_grads=True
        )
        ctx.head, ctx.kernel, ctx.rows, ctx.own, ctx.part, ctx.here = head, kernel, rows, own, part, here
        ctx.kernel_is_fused, ctx.draw, ctx.taken = fused, sample.draw, taken
        ctx.embedding_dtype = embeddings.dtype
        ctx.negatives = negatives.detach(), negatives_slope
        ctx.learned_slopes = learned_slopes
        ctx.save_for_backward(unit, inverse, own_rows, target_slope, norm_slope)
        return loss.detach().to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RuntimeError("the head's gradient has no gradient of its own: call backward without create_graph")
        with devices.own_precision(grad.device):
            learned = ((slope * grad).to(grad.dtype) for slope in ctx.learned_slopes)
            return _gradients(ctx, grad), None, None, None, None, *learned


def _gradients(ctx: Any, grad: Tensor) -> Tensor:
    head: PartialFC = ctx.head
    unit, inverse, own_rows, target_slope, norm_slope = ctx.saved_tensors
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
    embedding_grad = normalize_backward(mine_grad, unit[mine], inverse[mine])
    if len(norm_slope):  # ∂‖x‖/∂x = x̂
        embedding_grad += (norm_slope[mine] * grad.double()).to(unit.dtype)[:, None] * unit[mine]
    embedding_grad = (embedding_grad * head.exchange.world_size).to(ctx.embedding_dtype)
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
        fetched = head.staged.fetched((step, class_rate)) if class_rate < 1.0 else None
        negatives = None if fetched is None else fetched[:: head.sub_centers] // head.sub_centers
    classes = sample_classes(known, head.shard, rate=class_rate, seed=seed, step=step, fixed=fixed, negatives=negatives)
    classes = replace(classes, columns=classes.columns.to(device))
    batch = sample_batch(size, rate=batch_rate, seed=seed, step=step, device=device, fixed=fixed)
    head.last_sample = LastSample(classes, torch.arange(size, device=device) if batch is None else batch)
    return classes, batch


def _of_own(
    head: "PartialFC", rows: SampledRows, unit: Tensor, labels: Tensor, columns: Tensor, here: slice | Tensor
) -> tuple[Tensor, Tensor]:
    """The normalised own rows [M, D] of the samples ``here``; and z_y, and where there are any the classes' weights, of
    the batch, float64 [1 or 2, B], 0 for those of other ranks."""
    columns = columns[here]
    own_rows = unit.new_zeros(len(columns), head.embedding_dim)
    if len(rows):
        own_rows = torch.where((columns >= 0)[:, None], normalize(rows.at(columns.clamp_min(0)))[0], 0.0)
    found = unit.new_zeros(1 if head.class_weights is None else 2, len(labels), dtype=torch.float64)
    found[0, here] = (unit[here].double() * own_rows.double()).sum(dim=1)
    if head.class_weights is not None and head.shard.rows:
        weights = head.class_weights[(labels[here] - head.shard.start).clamp(0, head.shard.rows - 1)].double()
        found[1, here] = torch.where(columns >= 0, weights, 0.0)
    return own_rows, found


def _rows(head: "PartialFC", sample: ClassSample) -> tuple[SampledRows, TakenRows | None]:
    """The step's rows: the stored ones, or a copy of them; the reading of the next step's begins."""
    weight, staged = head.weight.detach(), head.staged
    index = sample.rows if sample.rows is None else rows_of_classes(sample.rows, head.sub_centers)
    if staged is None:
        return SampledRows(weight, index), None
    if index is None:  # all of them, a block at a time
        staged.settle()
        return SampledRows(weight, None, head.device), None
    taken = staged.take(index, spare=len(sample.columns) * head.sub_centers)
    shard, seed, step, rate, each = head.shard, head.seed, head.steps + 1, head.sample_rate, head.sub_centers
    staged.fetch((step, rate), lambda: rows_of_classes(negative_rows(shard, rate=rate, seed=seed, step=step), each))
    return SampledRows(taken.parts[0], taken.index), taken


def rows_of_classes(classes: Tensor, sub_centers: int) -> Tensor:
    """Places of the rows of some classes, int64 [n·S]: those of a class stand next to each other."""
    if sub_centers == 1:
        return classes
    return (classes[:, None] * sub_centers + torch.arange(sub_centers, device=classes.device)).flatten()


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
