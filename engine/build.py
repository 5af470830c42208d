"""From the sections of a configuration to what is trained: network, head and their optimizers."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.errors import UsageError
from ..partial_fc import PartialFC, RowAdagrad, RowAdamW, RowOptimizer, RowSGD
from ..partial_fc.kernels.products import ComputeDtype
from . import device as devices
from .backbones import build_backbone
from .backbones.from_timm import TimmBackbone
from .backbones.recompute import recompute
from .config import Adagrad, AdamW, Config
from .ema import Average
from .groups import Treatment, optimizer_groups, treatments
from .ranks.distributed import World
from .training_data import Dataset


def completed(config: Config, dataset: Dataset) -> Config:
    """The configuration with what the data set says filled in, as it is written into the run and its checkpoints."""
    size, classes = config.data.image_size, config.head.num_classes
    if size is None and dataset.image_size is None:
        raise UsageError(
            f"data set {dataset.name!r} does not say how large its images are (or its parts differ): give "
            "data.image_size"
        )
    if classes is not None and classes != dataset.num_classes:
        raise UsageError(
            f"head.num_classes is {classes}, but data set {dataset.name!r} has {dataset.num_classes} identities: "
            "leave it out, or give the right data set"
        )
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"image_size": size or list(dataset.image_size or ())}),
            "head": config.head.model_copy(update={"num_classes": dataset.num_classes}),
        }
    )


def input_size(config: Config) -> tuple[int, int]:
    """Height and width of the network's input, of a completed configuration."""
    assert config.data.image_size is not None
    height, width = config.data.image_size
    return height, width


@dataclass(frozen=True)
class Parts:
    """What is trained, and by what; on one rank."""

    network: nn.Module
    average: Average | None
    treatments: Mapping[str, Treatment]
    head: PartialFC
    backbone_optimizer: torch.optim.Optimizer
    head_optimizer: RowOptimizer
    scaler: torch.amp.GradScaler


def build_parts(config: Config, world: World, *, initialise: bool = True, class_weights: Tensor | None = None) -> Parts:
    """All parts, of a completed configuration.

    Args:
        initialise: whether the centers begin at random.
        class_weights: float [C], as ``read_class_weights`` gives them.
    """
    network = build_network(config, world)
    head = build_head(config, world, initialise=initialise, class_weights=class_weights)
    found = treatments(network, config.optimizer)
    return Parts(
        network,
        Average(network, config.backbone.ema) if config.backbone.ema is not None else None,
        found,
        head,
        build_backbone_optimizer(config, network, head, found),
        build_head_optimizer(config, head),
        torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16"),
    )


def new_network(config: Config, image_size: tuple[int, int], *, apart_from: Path | None = None) -> nn.Module:
    """The backbone that the configuration names, with random weights, on the CPU.

    Args:
        apart_from: the folder of the run that the configuration comes with: no code in it is run, nor any that it
            points to (``run.code``), only what is on the Python path.
    """
    section = config.backbone
    network = build_backbone(
        section.name,
        embedding_dim=section.embedding_dim,
        image_size=image_size,
        folder=config.run.code if apart_from is None else None,
        apart_from=apart_from,
        **section.options,
    )
    if section.recompute:
        recompute(network)
    return network


def build_network(config: Config, world: World) -> nn.Module:
    section = config.backbone
    network = new_network(config, input_size(config)).to(world.device)
    if section.sync_bn:
        if world.device.type == "cpu":
            raise UsageError("backbone.sync_bn: torch has it on GPUs only; on a CPU take a backbone with norm: group")
        network = synchronised(network)
    if devices.channels_last(section.channels_last, world.device):
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def synchronised(network: nn.Module) -> nn.Module:
    """The network with BatchNorm statistics over all ranks.

    Raises:
        UsageError: it has a BatchNorm of another kind, whose own work torch's conversion would lose.
    """
    if isinstance(network, TimmBackbone):  # whose BatchNorms are also activations
        from timm.layers import convert_sync_batchnorm  # pyright: ignore[reportPrivateImportUsage]

        return convert_sync_batchnorm(network)
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and type(module).__module__ != _BatchNorm.__module__:
            raise UsageError(
                f"backbone.sync_bn: {name} is a {type(module).__name__}, which would become a plain SyncBatchNorm: "
                "leave sync_bn out"
            )
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def products_name(config: Config) -> Literal["float32", "tf32", "bf16"]:
    """What the head's products are made in, by the configuration's names."""
    return config.head.products or ("bf16" if config.precision == "bf16" else "float32")


def products_of(config: Config) -> ComputeDtype:
    """The same as the head takes it."""
    return {"float32": torch.float32, "bf16": torch.bfloat16}.get(products_name(config), "tf32")


def build_head(
    config: Config, world: World, *, initialise: bool = True, class_weights: Tensor | None = None
) -> PartialFC:
    section = config.head
    assert section.num_classes is not None
    try:
        return PartialFC(
            section.num_classes,
            config.backbone.embedding_dim,
            objective=section.objective.build(),
            sample_rate=section.sample_rate,
            batch_rate=section.batch_rate,
            seed=config.run.seed,
            device=world.device,
            center_dtype=section.stored_dtype,
            storage=section.storage,
            storage_dir=section.storage_dir or config.run.path,
            row_state=row_state_of(config),
            initialise=initialise,
            progress=_Initialising(world),
            sub_centers=section.sub_centers,
            class_weights=class_weights,
            compute_dtype=products_of(config),
            keep_bytes=None if section.keep_mib is None else section.keep_mib << 20,
            payload_dtype={"float32": torch.float32, "bf16": torch.bfloat16, None: None}[section.payload_dtype],
        )
    except OSError as error:
        raise UsageError(
            f"head.storage: {error.filename}: {error.strerror}; set head.storage_dir, or make room"
        ) from None


def row_state_of(config: Config) -> dict[str, int]:
    """What the head's optimizer keeps beside each center: name → numbers."""
    section, dim = config.optimizer.head, config.backbone.embedding_dim
    if isinstance(section, AdamW):
        return RowAdamW.row_state(dim)
    return RowAdagrad.row_state(dim) if isinstance(section, Adagrad) else RowSGD.row_state(dim, section.momentum)


_SECONDS_BETWEEN_LINES = 5.0


class _Initialising:
    """Says how many centers are initialised: to the watchdog, and on the first rank every few seconds to the reader."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.told = time.monotonic()

    def __call__(self, done: int, rows: int) -> None:
        self.world.heartbeat.moved()
        if self.world.is_main and time.monotonic() - self.told > _SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            print(f"initialising centers: {done:,} of this rank's {rows:,}", flush=True)


def build_backbone_optimizer(
    config: Config, network: nn.Module, head: PartialFC, found: Mapping[str, Treatment]
) -> torch.optim.Optimizer:
    """Fused, on CPUs too: it reads on the device whether a step is to be skipped (``found_inf``). What the head's
    objective learns besides the centers is in a group of its own, without weight decay.

    All of its state is there, zero, before the first step: torch makes it in that step, out of uninitialised memory
    where the step is skipped; and a checkpoint is read into it where it lies, on its device and with its strides.
    """
    section = config.optimizer.backbone
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = optimizer_groups(network, found)
    if learned := head.objective_state.learned():
        groups.append({"params": learned, "weight_decay": 0.0})
        parameters = [*parameters, *learned]
    if isinstance(section, AdamW):
        betas = section.betas[0], section.betas[1]
        adamw = torch.optim.AdamW(groups, section.lr, betas, section.eps, section.weight_decay, fused=True)
        for parameter in parameters:
            adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return adamw
    sgd = torch.optim.SGD(
        groups,
        section.lr,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        nesterov=section.nesterov,
        fused=True,
    )
    if section.momentum:
        for parameter in parameters:
            sgd.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    return sgd


def build_head_optimizer(config: Config, head: PartialFC) -> RowOptimizer:
    section = config.optimizer.head
    if isinstance(section, AdamW):
        return RowAdamW(
            head,
            section.lr,
            (section.betas[0], section.betas[1]),
            section.eps,
            section.weight_decay,
            dense=section.dense,
        )
    if isinstance(section, Adagrad):
        return RowAdagrad(head, section.lr, section.eps, section.weight_decay)
    return RowSGD(head, section.lr, section.momentum, section.weight_decay, section.nesterov, dense=section.dense)
