"""PartialFC: the sharded classification head, from embeddings and labels to the loss and the gradients."""

import os
from collections.abc import Callable, Mapping, Sequence
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
from .kernels.rows import computed_dtype
from .objectives import Objective
from .objectives.state import ObjectiveState
from .row_gradient import RowGradient
from .sampling import LastSample
from .side_stream import SideStream
from .step import HeadLoss
from .storage import PLACES, RowStore, StagedRows, Storage


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
        sub_centers: S rows a class, in [1, 64]. The nearest one counts, of a sample's own class and of the others, so
            that images of another kind, or of another person under this name, get a center of their own (Deng et al.
            2020, "Sub-center ArcFace"). Sampling draws classes.
        class_weights: weight of each class's samples in the mean of the losses, float [C], finite and not negative, the
            same on every rank; all 1 when None.
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
        sub_centers: int = 1,
        class_weights: Tensor | None = None,
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
        if not 1 <= sub_centers <= 64:
            raise ValueError(f"sub_centers must lie in [1, 64], found {sub_centers}")
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.sub_centers = sub_centers
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
        rows = self.shard.rows * sub_centers
        if storage == "device":
            centers = torch.zeros(rows, embedding_dim, dtype=center_dtype, device=where)
        else:
            folder = storage_dir if storage == "file" else None
            store = RowStore(rows, embedding_dim, center_dtype, row_state or {}, folder)
            centers, self.staged = store.centers, StagedRows(store, where)
        if initialise:
            fill_initially(self._by_class(centers), self.shard, seed, progress)
        self.weight = nn.Parameter(centers)
        """This rank's centers [rows·S, D], where they are stored. Its ``grad`` stays None: see ``row_gradients``. See
        too ``wait_for_update``."""
        expected = max(2, round(num_classes * self.sample_rate))
        self.objective_state = ObjectiveState(objective, expected, where, computed_dtype(center_dtype))
        """What the objective keeps; its parameters, if it learns any, are for an optimizer of your own: their
        gradient is that of the global mean on every rank."""
        self.class_weights: Tensor | None
        weights = None if class_weights is None else self._checked_weights(class_weights).to(where)
        self.register_buffer("class_weights", weights, persistent=False)
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
        """All centers, DTensor [C, D] with Shard(0), [C, S, D] of S > 1 sub-centers; its local part is this rank's
        memory."""
        self.wait_for_update()
        return self.as_dtensor(self.weight.detach())

    def as_dtensor(self, rows: Tensor) -> DTensor:
        """Numbers of this rank's rows [rows·S, ...] with those of all ranks, [C, ...] or [C, S, ...]."""
        return as_dtensor(self._by_class(rows), self.num_classes, self.exchange)

    def read(self, rows: Tensor, value: Tensor) -> None:
        """Copies a checkpoint's value, as ``as_dtensor`` makes it or a full tensor, into this rank's ``rows``."""
        read_rows(self._by_class(rows), self.shard, value)

    def _by_class(self, rows: Tensor) -> Tensor:
        """This rank's rows [rows·S, ...], with S > 1 sub-centers as [rows, S, ...]; the same memory."""
        return rows if self.sub_centers == 1 else rows.unflatten(0, (self.shard.rows, self.sub_centers))

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
            source: [N, D], or [N, S, D] of S > 1 sub-centers, the same on every rank; or a function (start, stop) →
                [stop − start, ...] of the source's rows, asked for a block at a time.
            classes: for each class here its row in the source, int64 [C]; −1 for a new class, which keeps the center
                that it has. None where the source has the same classes, N = C. So a head with more, fewer or
                reordered classes goes on with what another one learned.

        Raises:
            ValueError: a shape, or a row of the source, does not fit.
        """
        self.wait_for_update()
        write_rows(self._by_class(self.weight.data), self.shard, source, classes)

    def wait_for_update(self) -> None:
        """All that comes next waits for the row update, which runs at the same time as the backbone's backward pass.

        Changed rows are stored too when it returns. The head calls it wherever it reads or writes the centers; so must
        who takes ``weight`` as it is.
        """
        if self.side_stream is not None:
            self.side_stream.join()
        if self.staged is not None:
            self.staged.settle()

    def clear_gradients(self) -> None:
        """Forgets the gradients gathered so far; the row optimizer's ``zero_grad`` calls it."""
        self.row_gradients.clear()
        self.gradients_applied = False
        self.accumulated_scale = None
        self.gradient_scale.grad = None

    def add_gradient(self, gradient: RowGradient, scale: Tensor) -> None:
        """One more pass's gradient by the centers.

        Args:
            scale: what its loss was multiplied with, []; NaN where something is not finite.
        """
        probe = self.gradient_scale
        if probe.grad is None or probe.grad._version != self._probe_version:
            self.clear_gradients()  # a module's zero_grad has cleared it, which knows no row gradients
        self.row_gradients.append(gradient)
        scale = scale.to(probe.dtype)
        probe.grad = scale.clone() if probe.grad is None else probe.grad + scale
        self._probe_version = probe.grad._version
        self.accumulated_scale = scale if self.accumulated_scale is None else self.accumulated_scale + scale

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
            learned = self.objective_state.learned()
            return HeadLoss.apply(  # type: ignore[return-value]
                embeddings, self.weight, labels.contiguous(), self, torch.is_grad_enabled(), *learned
            )

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
        self.objective_state._apply(fn)
        if self.class_weights is not None:
            self.class_weights = fn(self.class_weights)
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
        there = {name for name in there if not name.startswith(f"{prefix}objective_state.")}  # which reads its own
        missing.extend(sorted(names - there))
        unexpected.extend(sorted(there - names))
        if not names <= there:
            return
        self.wait_for_update()
        try:
            self.read(self.weight, state_dict[prefix + "centers"])
        except ValueError as error:
            errors.append(f"{prefix}centers: {error}; load_centers takes centers of other classes")
            return
        self.steps = int(state_dict[prefix + "steps"])

    def _checked_weights(self, weights: Tensor) -> Tensor:
        """This rank's part of the class weights, float32 [rows]."""
        if weights.shape != (self.num_classes,):
            raise ValueError(f"class_weights must be [{self.num_classes}], found {list(weights.shape)}")
        if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
            raise ValueError("class_weights must be finite and not negative")
        return weights[self.shard.start : self.shard.stop].float().clone()

    def extra_repr(self) -> str:
        return (
            f"{self.num_classes} classes, {self.embedding_dim} dimensions, {self.objective}, sample_rate="
            f"{self.sample_rate}, batch_rate={self.batch_rate}, rows {self.shard.start}–{self.shard.stop} here"
        )


def _checked_rate(name: str, rate: float) -> float:
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1], found {rate}")
    return rate
