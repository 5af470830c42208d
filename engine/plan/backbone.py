"""A dry run of the backbone's step on fake tensors: what it keeps, what it computes, what it moves; nothing is real."""

import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ...data.errors import UsageError
from .. import device as devices
from ..build import new_network
from ..config import AdamW, Config
from ..groups import freeze, treatments


@dataclass(frozen=True)
class BackboneCost:
    """One micro-batch of one rank; bytes.

    Attributes:
        parameters: of the trained ones, float32; their gradients, in DistributedDataParallel's buckets, take the same.
        other: frozen parameters and buffers.
        state: the optimizer's.
        images: the batch itself.
        activations: what autograd keeps from the forward pass to the backward pass.
        peak: most that is there at once in either pass, beyond parameters, gradients and images.
        operations: (floating-point operations, bytes read and written) → how many operations of the forward pass have
            them.
        average: of the averaged weights.
        backward: how many times of each operation the backward pass does; once more where activations are recomputed.
    """

    parameters: int
    other: int
    state: int
    images: int
    activations: int
    peak: int
    operations: dict[tuple[float, float], int]
    average: int = 0
    backward: int = 2

    @property
    def flops(self) -> float:
        """Floating-point operations of the forward pass."""
        return sum(flops * count for (flops, _), count in self.operations.items())

    def seconds(self, products: float, bandwidth: float) -> float:
        """The forward pass by a roofline, operation by operation."""
        return sum(
            max(flops / products, moved / bandwidth) * count for (flops, moved), count in self.operations.items()
        )


def dry_run(config: Config, image_size: tuple[int, int]) -> BackboneCost:
    """Forward and backward of one micro-batch of ``data.batch_size`` images under the run's autocast.

    Raises:
        UsageError: the network looks at numbers, which fake tensors do not have.
    """
    try:
        return _dry_run(config, image_size)
    except DataDependentOutputException as error:
        raise UsageError(
            f"backbone.name: {config.backbone.name} decides by the numbers in its tensors ({error}), so it cannot be "
            "planned: plan with another backbone of its size"
        ) from None


def _dry_run(config: Config, image_size: tuple[int, int]) -> BackboneCost:
    section = config.backbone
    device = torch.device("cpu")  # of the fake tensors: backward needs a device that this torch has
    network = new_network(config, image_size)  # a real one: some look at numbers as they are built
    freeze(network, treatments(network, config.optimizer), sys.maxsize)  # what is thawed at some step is planned thawed
    mode = FakeTensorMode()
    _made_fake(network, mode)
    with mode:
        network.train()
        images = torch.empty(config.data.batch_size, 3, *image_size)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        for parameter in trained:  # a gradient goes into DistributedDataParallel's bucket as soon as it is there
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with _Watch([*network.parameters(), *network.buffers(), images]) as watch:
            with devices.autocast(config.precision, device):
                embeddings: Tensor = network(images)
            activations, operations = watch.live, dict(watch.operations)
            if trained:
                embeddings.backward(torch.empty_like(embeddings))
    parameters = sum(one.nbytes for one in trained)
    everything = sum(one.nbytes for one in [*network.parameters(), *network.buffers()])
    return BackboneCost(
        parameters=parameters,
        other=everything - parameters,
        state=int(parameters * _states(config)),
        images=images.nbytes,
        activations=activations,
        peak=watch.peak,
        operations=operations,
        average=everything if section.ema is not None else 0,
        backward=(3 if section.recompute else 2) if trained else 0,
    )


def _made_fake(network: nn.Module, mode: FakeTensorMode) -> None:
    """Puts fake tensors in the place of the network's own."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = mode.from_tensor(parameter.detach())
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


def _states(config: Config) -> int:
    """How many numbers the backbone's optimizer keeps for a parameter."""
    section = config.optimizer.backbone
    return 2 if isinstance(section, AdamW) else int(section.momentum > 0)


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


class _Watch(TorchDispatchMode):
    """Counts the bytes of all tensors that were made inside and still exist, and each operation's work.

    Args:
        before: tensors that are there already; their views are not new.

    Attributes:
        live: bytes now; peak: at most.
        operations: see ``BackboneCost``.
    """

    def __init__(self, before: Sequence[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.operations: Counter[tuple[float, float]] = Counter()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in before)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = 0
        for tensor in _tensors(result):
            made += self._is_new(tensor)
        if made or func._schema.is_mutable:
            flops = flop_registry.get(func._overloadpacket)
            done = flops(*args, **kwargs, out_val=result) if flops else 0
            moved = sum(tensor.nbytes for tensor in (*_tensors((args, kwargs)), *_tensors(result)))
            self.operations[float(done), float(moved)] += 1
        return result

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, storage.nbytes())
        return True

    def _gone(self, size: int) -> None:
        self.live -= size


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
