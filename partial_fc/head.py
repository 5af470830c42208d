"""PartialFC: the sharded classification head, from embeddings and labels to the loss and the gradients."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from . import device as devices
from .centers import ClassShard, as_dtensor, fill_initially, read_rows, write_rows
from .exchange import Exchange
from .kernels.probabilities import KeepBudget
from .kernels.products import ComputeDtype
from .kernels.rows import OwnClasses, SampledRows, computed_dtype, normalize, normalize_backward
from .objectives import Objective
from .row_gradient import RowGradient, StagedGradient, StepGradient
from .sampling import ClassSample, negative_rows, sample_batch, sample_classes
from .side_stream import SideStream
from .storage import PLACES, RowStore, StagedRows, Storage, TakenRows


@dataclass(frozen=True)
class LastSample:
    """What the last step used on this rank.

    Attributes:
        sample: its classes.
        batch: places in the global batch that met the negatives, int64, ascending.
    """

    sample: ClassSample
    batch: Tensor

    @property
    def classes(self) -> Tensor:
        """Global class ids, int64 [K], ascending; on the host, where the centers are not on the device."""
        return self.sample.classes


class PartialFC(nn.Module):
    """Classification head whose class centers are sharded over the ranks, and sampled (Partial FC, An et al. 2022).

    Every rank calls it with its own part of the batch, equally many samples each, in the same order of calls. The loss
    is the mean over the global batch and is the same on every rank. In evaluation mode (``head.eval()``) nothing is
    sampled: the loss is that of all classes.

    ``loss.backward()`` leaves

    * in ``embeddings.grad`` W times the gradient of that mean by this rank's samples, W the number of ranks: after
      DistributedDataParallel has averaged over the ranks, the backbone's gradient is exactly that of the mean;
    * in ``head.row_gradients`` the gradient by the centers used, which a row optimizer (``pfc.partial_fc.RowSGD``)
      computes block by block as it applies it, from the centers as they are then: nothing else may change them between
      the forward pass and the optimizer's step. There is no dense gradient. Several backward passes add up, as
      everywhere in torch: for the average of n micro-batches divide each loss by n. An optimizer step uses them up:
    ``zero_grad`` must follow before the next one.

    Args:
        num_classes: C, over all ranks.
        embedding_dim: D.
        objective: see ``pfc.partial_fc.objectives``.
        sample_rate: share of the classes used each step, in (0, 1]. The classes of the batch are always used.
        batch_rate: share of the batch that meets the negatives, in (0, 1].
        seed: of the initial centers and of all samples.
        device: of the head's computations, and of the centers unless ``storage`` says otherwise; the current default
            device when None.
        center_dtype: float32, float64 or bfloat16, how the centers are stored, and the optimizer's state that is as
            wide. Rows in bfloat16 are computed in float32 and rounded stochastically when they are stored, by a hash of
            seed, step and class, so the same on any number of ranks.
        storage: where they are stored: "device"; "host" for the host's memory; "file" for a file on a
            local disk, mapped into memory. From the latter two a step's rows are copied to the device, the negatives
            while the step before runs, and written back while the next one runs (``storage.py``). The numbers are the
            same wherever they are stored, bit for bit on a CPU.
        storage_dir: folder of the file.
        row_state: name → numbers of state a row, or their shape, of the optimizer that is going to step the centers,
            where they are not on the device: ``RowSGD.row_state(dim, momentum=0.9)``. It is stored beside the centers.
        initialise: whether the centers begin at random; else at zero, to be loaded next.
        progress: is told, while the centers are initialised, how many rows are there and how many there will be.
        compute_dtype: of the matrix products; that of the computations, ``center_dtype`` or float32, when None. Sums
            are float32 or better in any case.
            "tf32" is float32 for which a GPU's tensor cores read 10 bits of each operand's mantissa: each is off by up
            to 2⁻¹¹ of itself, so a negative's cosine by less than 0.001 and its logit at scale 64 by less than 0.0625
            (mostly a hundredth of that), where bfloat16 operands are off by 2⁻⁹. A CPU makes them in float32.
        keep_bytes: how much the probabilities [B, K] of a step may take between the forward pass and the row update,
            in bytes, those of all its backward passes together; above it they are recomputed, one more matrix
            product for less memory. A sixteenth of a GPU's memory when None, 1 GiB on a CPU.
        payload_dtype: what embeddings and their gradients travel in between the ranks, such as bfloat16 for half the
            bytes; embeddings in their own dtype and gradients in ``center_dtype`` when None.
        process_group: the ranks that share the centers; the default group when None; one process alone where
            torch.distributed is not initialised.

    Raises:
        ValueError: an argument outside its range.
        OSError: the disk refused the file of the centers.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        objective: Objective,
        sample_rate: float = 1.0,
        batch_rate: float = 1.0,
        seed: int = 0,
        device: torch.device | str | None = None,
        center_dtype: torch.dtype = torch.float32,
        storage: Storage = "device",
        storage_dir: str | os.PathLike[str] | None = None,
        row_state: Mapping[str, int | Sequence[int]] | None = None,
        initialise: bool = True,
        progress: Callable[[int, int], None] | None = None,
        compute_dtype: ComputeDtype | None = None,
        keep_bytes: int | None = None,
        payload_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("embedding_dim", embedding_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if center_dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(f"center_dtype must be float32, float64 or bfloat16, found {center_dtype}")
        if storage not in PLACES:
            raise ValueError(f"storage must be one of {', '.join(PLACES)}, found {storage!r}")
        if storage == "file" and storage_dir is None:
            raise ValueError("storage file needs storage_dir, the folder that the file is to be in")
        if compute_dtype not in (None, torch.bfloat16, torch.float32, torch.float64, "tf32"):
            raise ValueError(f'compute_dtype must be bfloat16, float32, float64 or "tf32", found {compute_dtype}')
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.objective = objective
        self.sample_rate = sample_rate
        self.batch_rate = batch_rate
        self.seed = seed
        self.compute_dtype: ComputeDtype = compute_dtype or computed_dtype(center_dtype)
        self.exchange = Exchange(process_group, payload_dtype)
        self.shard = ClassShard.of(num_classes, self.exchange.rank, self.exchange.world_size)
        where = torch.device(device) if device is not None else torch.get_default_device()
        self.staged: StagedRows | None = None
        """The steps' copies of their rows, where the centers are not on the device."""
        if storage == "device":
            centers = torch.zeros(self.shard.rows, embedding_dim, dtype=center_dtype, device=where)
        else:
            folder = storage_dir if storage == "file" else None
            store = RowStore(self.shard.rows, embedding_dim, center_dtype, row_state or {}, folder)
            centers, self.staged = store.centers, StagedRows(store, where)
        if initialise:
            fill_initially(centers, self.shard, seed, progress)
        self.weight = nn.Parameter(centers)
        """This rank's centers [rows, D], where they are stored. Its ``grad`` stays None: see ``row_gradients``. See too
        ``wait_for_update``."""
        self.budget = KeepBudget(devices.default_keep_bytes(where) if keep_bytes is None else keep_bytes)
        """The limit ``keep_bytes``, and what is stored now."""
        self.gradient_scale = nn.Parameter(torch.ones((), device=where))
        """Its ``grad`` is the sum of what the losses were multiplied with before backward, NaN on every rank where a
        gradient of any rank is not finite. Row optimizers divide by what GradScaler makes of it; so leave the head's
        parameters out where you clip gradients by their norm. A float16 embedding's gradient is looked at in float32:
        an overflow of its own dtype shows in the backbone's gradients alone."""
        self.steps = 0
        """Forward passes in training mode so far; the next sample is that of (seed, steps)."""
        self.row_gradients: list[RowGradient] = []
        self.gradients_applied = False
        """Whether an optimizer step has used them."""
        self.accumulated_scale: Tensor | None = None
        self._probe_version = 0
        self.last_sample: LastSample | None = None
        self.side_stream: SideStream | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.gradient_scale.device

    @property
    def centers(self) -> DTensor:
        """All centers, DTensor [C, D] with Shard(0); its local part is this rank's memory."""
        self.wait_for_update()
        return as_dtensor(self.weight.detach(), self.num_classes, self.exchange)

    @property
    def keep_bytes(self) -> int:
        """What the probabilities may take."""
        return self.budget.limit

    @property
    def sample_rate(self) -> float:
        """Share of the classes used each step; may be set between steps, to the same value on every rank."""
        return self._sample_rate

    @sample_rate.setter
    def sample_rate(self, rate: float) -> None:
        self._sample_rate = _checked_rate("sample_rate", rate)

    @property
    def batch_rate(self) -> float:
        """Share of the batch that meets the negatives; may be set between steps, to the same value on every rank."""
        return self._batch_rate

    @batch_rate.setter
    def batch_rate(self, rate: float) -> None:
        self._batch_rate = _checked_rate("batch_rate", rate)

    @torch.no_grad()
    def load_centers(self, source: Tensor | Callable[[int, int], Tensor], classes: Tensor | None = None) -> None:
        """Sets the centers, from as many classes as there are here or, by way of ``classes``, from others.

        Args:
            source: [N, D], the same on every rank; or a function (start, stop) → [stop − start, D] of the source's
                rows, asked for a block at a time.
            classes: for each class here its row in the source, int64 [C]; −1 for a new class, which keeps the center
                that it has. None where the source has the same classes, N = C. So a head with more, fewer or
                reordered classes goes on with what another one learned.

        Raises:
            ValueError: a shape, or a row of the source, does not fit.
        """
        self.wait_for_update()
        write_rows(self.weight, self.shard, source, classes)

    def wait_for_update(self) -> None:
        """All that comes next waits for the row update, which runs at the same time as the backbone's backward pass.

        Changed rows are stored too when it returns. The head calls it wherever it reads or writes the centers; so must
        who takes ``weight`` as it is.
        """
        self._join_update()
        if self.staged is not None:
            self.staged.settle()

    def _join_update(self) -> None:
        if self.side_stream is not None:
            self.side_stream.join()

    def clear_gradients(self) -> None:
        """Forgets the gradients gathered so far; the row optimizer's ``zero_grad`` calls it."""
        self.row_gradients.clear()
        self.gradients_applied = False
        self.accumulated_scale = None
        self.gradient_scale.grad = None

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the global batch, a float32 scalar (float64 where the centers are).

        Args:
            embeddings: this rank's samples [b, D], not normalised, float16, bfloat16, float32 or float64. An embedding
                of zeros has cosine 0 with every center, and gradient 0.
            labels: their classes, int64 [b], in [0, C), of any rank's shard.

        Raises:
            ValueError: shapes or types do not fit; or, on a CPU, a label outside the range, on every rank.
            RuntimeError: the step is recorded as a CUDA graph, which would draw the same sample every time.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim or len(embeddings) == 0:
            raise ValueError(f"embeddings must be [b, {self.embedding_dim}] with b ≥ 1, found {list(embeddings.shape)}")
        if labels.shape != embeddings.shape[:1] or labels.dtype != torch.int64:
            found = str(labels.dtype).removeprefix("torch.")
            raise ValueError(f"labels must be int64 [{len(embeddings)}], found {found} {list(labels.shape)}")
        if self.training and min(self.sample_rate, self.batch_rate) < 1 and devices.is_recorded(self.device):
            raise RuntimeError("a CUDA graph would repeat one class sample at every replay: leave the head out of it")
        with devices.own_precision(self.device):
            return _HeadLoss.apply(embeddings, self.weight, labels.contiguous(), self, torch.is_grad_enabled())  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PartialFC":
        """What ``to``, ``cuda``, ``double`` and the like do. Centers that are stored elsewhere stay there."""
        self.wait_for_update()
        was, wanted = self.weight.dtype, fn(self.weight.data[:0]).dtype
        if wanted != was and (self.staged is not None or not {was, wanted} <= {torch.float32, torch.float64}):
            raise ValueError(f"the centers are {was} and cannot become {wanted}: give PartialFC another center_dtype")
        self.clear_gradients()
        self.side_stream = None
        if self.staged is None:
            return super()._apply(fn, recurse)
        self.gradient_scale.data = fn(self.gradient_scale.data)
        self.staged = StagedRows(self.staged.store, self.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, or a pickle: without gradients, which are of this head's centers."""
        if self.staged is not None:
            raise TypeError("centers in host memory or a file are not copied with their head: see state_dict")
        self.wait_for_update()
        left = {"row_gradients": [], "gradients_applied": False, "accumulated_scale": None, "last_sample": None}
        return self.__dict__ | left

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "centers"] = self.centers
        destination[prefix + "steps"] = torch.tensor(self.steps)

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing, unexpected, errors = rest
        names = {prefix + "centers", prefix + "steps"}
        there = {name for name in state_dict if name.startswith(prefix)}
        missing.extend(sorted(names - there))
        unexpected.extend(sorted(there - names))
        if not names <= there:
            return
        self.wait_for_update()
        try:
            read_rows(self.weight, self.shard, state_dict[prefix + "centers"])
        except ValueError as error:
            errors.append(f"{prefix}centers: {error}; load_centers takes centers of other classes")
            return
        self.steps = int(state_dict[prefix + "steps"])

    def extra_repr(self) -> str:
        return (
            f"{self.num_classes} classes, {self.embedding_dim} dimensions, {self.objective}, sample_rate="
            f"{self.sample_rate}, batch_rate={self.batch_rate}, rows {self.shard.start}–{self.shard.stop} here"
        )

    def _sample(self, labels: Tensor, *, fixed: bool) -> tuple[ClassSample, Tensor | None]:
        """The classes and the part of the batch [B'] (None for all) of this step."""
        class_rate, batch_rate = (self.sample_rate, self.batch_rate) if self.training else (1.0, 1.0)
        seed, step, size, device = self.seed, self.steps, len(labels), labels.device
        known = labels if self.staged is None else labels.cpu()  # where the rows are copied from
        classes = sample_classes(known, self.shard, rate=class_rate, seed=seed, step=step, fixed=fixed)
        classes = replace(classes, columns=classes.columns.to(device))
        batch = sample_batch(size, rate=batch_rate, seed=seed, step=step, device=device, fixed=fixed)
        self.last_sample = LastSample(classes, torch.arange(size, device=device) if batch is None else batch)
        return classes, batch

    def _rows(self, sample: ClassSample) -> tuple[SampledRows, TakenRows | None]:
        """The step's rows: the stored ones, or a copy of them."""
        weight, staged = self.weight.detach(), self.staged
        if staged is None:
            return SampledRows(weight, sample.rows), None
        if sample.rows is None:  # all of them, a block at a time
            staged.settle()
            return SampledRows(weight, None, self.device), None
        taken = staged.take(sample.rows, spare=len(sample.columns))
        rate, seed, step = self.sample_rate, self.seed, self.steps + 1
        if self.training and rate < 1.0:
            staged.fetch(lambda: negative_rows(self.shard, rate=rate, seed=seed, step=step))
        return SampledRows(taken.parts[0], taken.index), taken

    def _check_labels(self, labels: Tensor) -> None:
        """Every rank sees all labels, so that all of them refuse a wrong one together and none is left waiting."""
        wrong = (labels < 0) | (labels >= self.num_classes)
        if not devices.host_sees(labels.device):
            message = f"a label lies outside [0, {self.num_classes})"
            torch._assert_async(~wrong.any(), message)
        elif wrong.any():
            place = int(wrong.nonzero()[0])
            rank, position = divmod(place, len(labels) // self.exchange.world_size)
            raise ValueError(
                f"label {int(labels[place])} (sample {position} of rank {rank}) lies outside [0, {self.num_classes})"
            )


def _checked_rate(name: str, rate: float) -> float:
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1], found {rate}")
    return rate


class _HeadLoss(torch.autograd.Function):
    """One step of the head, in seven parts."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, weight: Tensor, labels: Tensor, head: PartialFC, backward: bool
    ) -> Tensor:
        objective = head.objective.at(head.steps)
        head._join_update()
        dtype = computed_dtype(weight.dtype)
        # ① the global batch
        batch, labels = head.exchange.gather_batch(embeddings.detach(), labels)
        head._check_labels(labels)
        unit, inverse = normalize(batch.to(dtype))  # [B, D], [B, 1]
        # ② the sample
        sampled = head.training and head.sample_rate < 1.0
        computed = weight if head.staged is None or not sampled else head.staged.centers
        fused = objective.fused_kernel(computed, head.compute_dtype, head.budget)
        sample, part = head._sample(labels, fixed=fused is not None and head.staged is None)
        rows, taken = head._rows(sample)
        everyone = slice(None) if part is None else part
        # ③ two numbers per sample
        part_unit = unit[everyone]
        size = len(part_unit)
        kernel = fused or objective.kernel(size, head.embedding_dim, len(rows), head.compute_dtype, head.budget)
        own = OwnClasses(sample.columns)
        own_rows = torch.zeros_like(unit)
        if len(rows):
            here = (own.columns >= 0)[:, None]  # [B, 1], whether the sample's class is
            own_rows = torch.where(here, normalize(rows.at(own.columns.clamp_min(0)))[0], 0.0)
        numbers = torch.zeros(2, len(labels), dtype=torch.float64, device=unit.device)
        numbers[0] = (unit.double() * own_rows.double()).sum(dim=1)
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
        ctx.head, ctx.kernel, ctx.rows, ctx.own, ctx.everyone = head, kernel, rows, own, everyone
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
            return _HeadLoss._gradients(ctx, grad), None, None, None, None

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> Tensor:
        head: PartialFC = ctx.head
        unit, inverse, own_rows, target_slope = ctx.saved_tensors
        negatives, negatives_slope = ctx.negatives
        part_grad, unit_rows_grad = ctx.kernel.backward(negatives, negatives_slope * grad.double())
        own_slope = (target_slope * grad.double()).to(unit.dtype)[:, None]  # [B, 1]
        # ⑥ ∂loss/∂embeddings, of all ranks' classes, to each rank its own samples
        unit_grad = torch.zeros_like(unit)  # [B, D]
        unit_grad[ctx.everyone] = part_grad
        unit_grad += own_slope * own_rows
        mine_grad, broken = head.exchange.sum_and_scatter(unit_grad, ~torch.isfinite(grad))
        size = len(mine_grad)
        mine = slice(head.exchange.rank * size, (head.exchange.rank + 1) * size)
        embedding_grad = normalize_backward(mine_grad, unit[mine], inverse[mine]) * head.exchange.world_size
        embedding_grad = embedding_grad.to(ctx.embedding_dtype)
        if not ctx.needs_input_grad[1]:  # frozen centers
            return embedding_grad
        # ⑦ ∂loss/∂rows, computed in the row update
        slopes = own_slope * unit
        if ctx.kernel_is_fused:
            from .kernels.fused.gradient import FusedGradient

            padded = ctx.taken is None
            gradient = FusedGradient(unit_rows_grad, ctx.own.columns, slopes, ctx.draw, padded=padded)
        else:
            gradient = StepGradient(ctx.rows, unit_rows_grad, ctx.own, slopes)
        if ctx.taken is not None:
            gradient = StagedGradient(gradient, ctx.taken, ctx.rows)
        _accumulate(head, gradient, torch.where(broken > 0, torch.nan, grad))
        assert head.gradient_scale.grad is not None
        head.side_stream = head.side_stream or SideStream(unit.device)
        head.side_stream.mark(head.gradient_scale.grad)
        return embedding_grad


def _accumulate(head: PartialFC, gradient: RowGradient, scale: Tensor) -> None:
    probe = head.gradient_scale
    if probe.grad is None or probe.grad._version != head._probe_version:
        head.clear_gradients()  # a module's zero_grad has cleared it, which knows no row gradients
    head.row_gradients.append(gradient)
    scale = scale.to(probe.dtype)
    probe.grad = scale.clone() if probe.grad is None else probe.grad + scale
    head._probe_version = probe.grad._version
    head.accumulated_scale = scale if head.accumulated_scale is None else head.accumulated_scale + scale
