"""Row optimizers: they change the centers that a step used, and nothing else.

Each does what torch's optimizer of that name would do if every center were a parameter of its own, stepped only when a
batch touched it: rows that were not sampled keep their values and their state to the last bit, through momentum and
weight decay too. (With ``dense`` those move them, as they do in torch's own with a dense gradient.) They are
``torch.optim.Optimizer``s: LR schedulers, ``param_groups``, ``state_dict`` and GradScaler work on them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import device as devices
from .head import PartialFC
from .kernels.rounding import Rounding
from .kernels.row_step import RowStep
from .kernels.rows import block_rows, computed_dtype
from .row_gradient import GradientSum, RowGradient, StagedGradient
from .row_update import apply
from .storage import CENTERS, TakenRows


class RowOptimizer(torch.optim.Optimizer, ABC):
    """Base of the row optimizers: gathers the gradients of all backward passes, skips broken steps, walks the rows.

    A subclass names its state in ``_state_shapes`` and computes in ``update``; where it is one of the rules that
    ``RowStep`` knows, ``step_rows`` has them done in one pass.

    A step whose gradient is not finite on some rank, or whose GradScaler found an infinity, changes nothing on any
    rank and is counted in ``skipped_steps``.

    Args:
        head: whose centers are optimised.
        defaults: the hyper-parameters.
        dense: whether all rows are stepped, those that were not sampled by a gradient of zeros. It costs a pass over
            the whole shard in every step, and needs the centers on the head's device.
    """

    step_rows: Any = None
    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf without a host synchronisation

    def __init__(self, head: PartialFC, defaults: dict[str, Any], *, dense: bool = False) -> None:
        super().__init__([head.weight, head.gradient_scale], defaults)
        if dense and head.staged is not None:
            raise ValueError("dense steps pass over all centers: they need storage on the device")
        self.head = head
        self.dense = dense
        self._row_state()
        self._skipped = torch.zeros((), dtype=torch.int64, device=head.device)

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were skipped, int64 [] on the head's device."""
        self.head.wait_for_update()
        return self._skipped

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "update" in cls.__dict__ and "step_rows" not in cls.__dict__:
            cls.step_rows = None  # that of a base class is of another rule

    def __getstate__(self) -> dict[str, Any]:
        self.head.wait_for_update()
        return super().__getstate__() | {"head": self.head, "dense": self.dense, "_skipped": self._skipped}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.head.clear_gradients()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self.head.row_gradients
        if not gradients:
            return loss
        if self.head.gradients_applied:
            raise RuntimeError("these gradients are applied already: call zero_grad() after every step")
        self.head.gradients_applied = True
        side_stream = self.head.side_stream
        if side_stream is None:  # gradients that come from no backward pass of the head
            self._step(gradients)
            return loss
        late = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)  # GradScaler's, of all gradients
        in_use = (*gradients, self.head.accumulated_scale, *late)
        with side_stream.running(self.head.gradient_scale.grad, in_use, late=any(one is not None for one in late)):
            self._step(gradients)
        return loss

    def _step(self, gradients: list[RowGradient]) -> None:
        with devices.own_precision(self.head.device):
            factor, broken = self._scaling()
            self._skipped += broken
            if devices.host_sees(broken.device) and broken:
                return
            if self.head.staged is not None and all(isinstance(one, StagedGradient) for one in gradients):
                self._step_copy(gradients, factor, broken)  # type: ignore[arg-type]
                return
            if self.head.staged is not None:  # all rows, where they are stored
                self.head.staged.settle()
                copies = [one for one in gradients if isinstance(one, StagedGradient)]
                if copies:
                    self._read_again(copies, torch.cat([one.taken.places for one in copies]).unique())
            tensors = [self.head.weight.data, *self._row_state().values()]
            apply(gradients, tensors, self, factor, broken, self._rounding(), self.head.sub_centers, dense=self.dense)

    def _step_copy(self, gradients: list[StagedGradient], factor: Tensor, broken: Tensor) -> None:
        """Steps a copy of the rows, which is then written back."""
        staged = self.head.staged
        assert staged is not None
        gradient: RowGradient = gradients[0].inner
        taken = gradients[0].taken
        if len(gradients) > 1 or taken is not staged.latest:  # later passes may have taken their places
            total = GradientSum(gradients, block_rows(staged.centers, sub_centers=self.head.sub_centers))
            assert total.index is not None
            taken = self._read_again(gradients, total.index.cpu())
            if len(gradients) > 1:
                total.index = None  # the copy has these rows alone, in this order
                gradient = total
        parts = dict(zip(staged.store.parts, taken.parts, strict=True))
        tensors = [parts[CENTERS], *(parts[name] for name in self._row_state())]
        rounding = self._rounding(taken.places.to(self.head.device))
        apply([gradient], tensors, self, factor, broken, rounding, self.head.sub_centers)
        staged.write(taken)

    def _read_again(self, gradients: list[StagedGradient], places: Tensor) -> TakenRows:
        """One copy of the rows of several passes, from which their gradients read from here on."""
        assert self.head.staged is not None
        taken = self.head.staged.sum_up(places)
        for one in gradients:
            one.read_from(taken)
        return taken

    def _rounding(self, ids: Tensor | None = None) -> Rounding | None:
        """How this step's rows are rounded; None where they are not.

        Args:
            ids: their places in the shard, int64 [K]; None where the gradient's are these.
        """
        head = self.head
        if head.weight.dtype != torch.bfloat16:
            return None
        return Rounding.of(head.seed, head.steps, head.shard.start * head.sub_centers, ids)

    def state_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``state``: name → DTensor [C, ...] with Shard(0); ``param_groups``: the hyper-parameters.

        Every state is there from the start, so that a checkpoint can be read into a fresh optimizer.
        """
        head = self.head
        head.wait_for_update()
        state = {name: head.as_dtensor(local) for name, local in self._row_state().items()}
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes what ``state_dict`` gave, its states as DTensors of this layout or as full tensors [C, ...]."""
        self.head.wait_for_update()
        local_state = self._row_state()
        if state_dict["state"].keys() != local_state.keys():
            raise ValueError(f"state has {sorted(state_dict['state'])}, this optimizer needs {sorted(local_state)}")
        for name, value in state_dict["state"].items():
            self.head.read(local_state[name], value)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)

    @abstractmethod
    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of the state of one row, [n]; asked when the base class is initialised."""

    @abstractmethod
    def update(self, weight: Tensor, gradient: Tensor, state: list[Tensor]) -> None:
        """Steps rows [n, D] and their state [n, ...] in place; the gradient [n, D] may be overwritten."""

    def _scaling(self) -> tuple[Tensor, Tensor]:
        """What the gradients are to be multiplied with, and whether the step is to be skipped (bool)."""
        head = self.head
        assert head.accumulated_scale is not None
        assert head.gradient_scale.grad is not None
        factor = head.gradient_scale.grad / head.accumulated_scale  # 1, or what GradScaler.unscale_ divided by
        factor = torch.where(head.accumulated_scale == 0, 1.0, factor)  # a loss times zero
        broken = ~torch.isfinite(head.gradient_scale.grad)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # GradScaler's
        if grad_scale is not None:
            factor = factor / grad_scale
        if found_inf is not None:
            broken = broken | (torch.as_tensor(found_inf, device=broken.device) > 0)
        return factor, broken

    def _row_state(self) -> dict[str, Tensor]:
        head = self.head
        state = self.state[head.weight]
        for name, shape in self._state_shapes().items():
            if name in state:
                continue
            if head.staged is None:
                wide = shape != (1,)
                dtype = head.weight.dtype if wide else computed_dtype(head.weight.dtype)
                state[name] = torch.zeros(len(head.weight), *shape, dtype=dtype, device=head.weight.device)
                continue
            stored = head.staged.store.parts
            if name not in stored or stored[name].shape[1:] != shape:
                raise ValueError(
                    f"the head has no place for {name} {list(shape)} of each row: give PartialFC a row_state, "
                    f"{type(self).__name__}.row_state(...)"
                )
            state[name] = stored[name]
        return state


class RowSGD(RowOptimizer):
    """SGD on rows: g ← g + λw, v ← μv + g, w ← w − η·v (with Nesterov: w ← w − η·(g + μv)), as torch.optim.SGD.

    Args:
        head: whose centers are optimised.
        lr: η.
        momentum: μ in [0, 1).
        weight_decay: λ ≥ 0.
        nesterov: Nesterov's form; needs momentum.
        dense: as ``RowOptimizer`` has it.
    """

    def __init__(
        self,
        head: PartialFC,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        dense: bool = False,
    ) -> None:
        _check(lr=lr, weight_decay=weight_decay)
        _check_shares(momentum=momentum)
        if nesterov and momentum == 0:
            raise ValueError("nesterov needs momentum > 0")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(head, defaults, dense=dense)

    @staticmethod
    def row_state(dim: int, momentum: float = 0.0) -> dict[str, int]:
        """Name → numbers of state a row of D = ``dim``, for ``PartialFC``."""
        return {"momentum": dim} if momentum else {}

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        return _shapes(self.row_state(self.head.embedding_dim, self.param_groups[0]["momentum"]))

    def update(self, weight: Tensor, gradient: Tensor, state: list[Tensor]) -> None:
        group = self.param_groups[0]
        momentum = group["momentum"]
        if group["weight_decay"]:
            gradient.add_(weight, alpha=group["weight_decay"])
        if momentum:
            (velocity,) = state
            torch.add(gradient, velocity, alpha=momentum, out=velocity)
            gradient = gradient.add_(velocity, alpha=momentum) if group["nesterov"] else velocity
        weight.sub_(gradient, alpha=group["lr"])

    def step_rows(self, rows: RowStep, weight: Tensor, state: list[Tensor]) -> None:
        group = self.param_groups[0]
        rows.sgd(
            weight,
            state[0] if state else None,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
        )


class RowAdamW(RowOptimizer):
    """AdamW on rows (Loshchilov & Hutter 2019, algorithm 2), as torch.optim.AdamW; each row counts its own steps.

    Args:
        head: whose centers are optimised.
        lr: η.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: λ ≥ 0, decoupled: w ← w·(1 − ηλ).
        dense: as ``RowOptimizer`` has it.
    """

    def __init__(
        self,
        head: PartialFC,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        dense: bool = False,
    ) -> None:
        _check(lr=lr, eps=eps, weight_decay=weight_decay)
        _check_shares(**{"betas[0]": betas[0], "betas[1]": betas[1]})
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(head, defaults, dense=dense)

    @staticmethod
    def row_state(dim: int) -> dict[str, int]:
        """Name → numbers of state a row of D = ``dim``, for ``PartialFC``."""
        return {"first_moment": dim, "second_moment": dim, "steps": 1}

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        return _shapes(self.row_state(self.head.embedding_dim))

    def update(self, weight: Tensor, gradient: Tensor, state: list[Tensor]) -> None:
        group = self.param_groups[0]
        first, second, steps = state
        beta1, beta2 = group["betas"]
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        steps += 1
        size = group["lr"] / (1 - beta1 ** steps.double())
        root = (1 - beta2 ** steps.double()).sqrt().to(weight.dtype)
        denominator = second.sqrt().div_(root).add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(first / denominator * size.to(weight.dtype))

    def step_rows(self, rows: RowStep, weight: Tensor, state: list[Tensor]) -> None:
        group = self.param_groups[0]
        first, second, steps = state
        rows.adamw(
            weight,
            (first, second),
            steps,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


class RowAdagrad(RowOptimizer):
    """Adagrad with one number of state a row: G ← G + mean(g²), w ← w − η·g/(√G + ε), with g ← g + λw before.

    The row-wise form that embedding tables use: 1/512 of the memory of momentum at D = 512, and a step
    that adapts to how often a class is seen.

    Args:
        head: whose centers are optimised.
        lr: η.
        eps: ε, added to the root.
        weight_decay: λ ≥ 0.
    """

    def __init__(self, head: PartialFC, lr: float = 1e-2, eps: float = 1e-10, weight_decay: float = 0.0) -> None:
        _check(lr=lr, eps=eps, weight_decay=weight_decay)
        super().__init__(head, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @staticmethod
    def row_state(dim: int) -> dict[str, int]:
        """Name → numbers of state a row, for ``PartialFC``."""
        return {"sum": 1}

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        return _shapes(self.row_state(self.head.embedding_dim))

    def update(self, weight: Tensor, gradient: Tensor, state: list[Tensor]) -> None:
        group = self.param_groups[0]
        if group["weight_decay"]:
            gradient.add_(weight, alpha=group["weight_decay"])
        (total,) = state
        total += gradient.square().mean(dim=1, keepdim=True)
        weight.sub_(gradient.div_(total.sqrt().add_(group["eps"])), alpha=group["lr"])

    def step_rows(self, rows: RowStep, weight: Tensor, state: list[Tensor]) -> None:
        group = self.param_groups[0]
        rows.adagrad(weight, state[0], lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"])


def _shapes(numbers: dict[str, int]) -> dict[str, tuple[int, ...]]:
    return {name: (count,) for name, count in numbers.items()}


def _check(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, found {value}")


def _check_shares(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), found {value}")
