"""The configurations that are predicted and measured, and their steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...engine import build
from ...engine.config import Config, parse_config
from ...engine.ranks.distributed import World
from ...engine.training_step import TrainingStep
from ..head.heads import Head
from ..ranks import Rank

BATCH = 128
"""Images of all ranks, of the heads."""


@dataclass(frozen=True)
class Case:
    """One configuration that is predicted and measured.

    Attributes:
        keys: what the configuration says besides the defaults.
        whole: whether the step is the trainer's, backbone and all; else it is a head's, on random embeddings.
    """

    ranks: int
    keys: dict[str, dict[str, Any]]
    whole: bool = False

    def __str__(self) -> str:
        config = self.config
        head, optimizer = config.head, config.optimizer.head
        state = ", momentum" if getattr(optimizer, "momentum", 0) else ""
        network = f"{config.backbone.name} b={config.data.batch_size}, " if self.whole else ""
        return (
            f"{network}C={head.num_classes:,} D={config.backbone.embedding_dim} rate {head.sample_rate:.4g}, "
            f"{head.storage}, {head.center_dtype}, {optimizer.name}{state}, {self.ranks} rank(s)"
        )

    @property
    def config(self) -> Config:
        data = {"train": "none", "batch_size": BATCH // self.ranks, "image_size": [112, 112]}
        tree = {"data": data, "schedule": {"steps": 1}, **self.keys}
        return parse_config({**tree, "data": {**data, **self.keys.get("data", {})}})


def head_case(classes: int, dim: int, rate: float, storage: str, dtype: str, optimizer: str, ranks: int) -> Case:
    head = {"num_classes": classes, "sample_rate": rate, "storage": storage, "center_dtype": dtype}
    keys = {"head": head, "backbone": {"embedding_dim": dim}, "optimizer": {"head": {"name": optimizer}}}
    return Case(ranks, keys)


CASES = (
    head_case(400_000, 512, 1.0, "device", "float32", "row_sgd", 1),
    head_case(300_000, 512, 0.1, "device", "float32", "row_adamw", 1),
    head_case(600_000, 512, 1.0, "device", "bf16", "row_adagrad", 1),
    head_case(400_000, 512, 0.1, "host", "float32", "row_sgd", 1),
    Case(
        1,
        {
            "data": {"batch_size": 16},
            "backbone": {"name": "iresnet18"},
            "head": {"num_classes": 100_000, "sample_rate": 0.1},
        },
        whole=True,
    ),
    head_case(400_000, 512, 0.1, "device", "float32", "row_sgd", 2),
    head_case(600_000, 512, 0.1, "device", "bf16", "row_sgd", 2),
    head_case(600_000, 512, 1 / 64, "host", "bf16", "row_adamw", 2),
    head_case(400_000, 512, 0.5, "file", "float32", "row_sgd", 2),
    Case(
        2,
        {
            "data": {"batch_size": 16},
            "backbone": {"name": "mobilefacenet"},
            "head": {"num_classes": 200_000, "sample_rate": 0.1},
        },
        whole=True,
    ),
    head_case(1_000_000, 128, 1 / 64, "device", "float32", "row_adagrad", 1),
    head_case(1_000_000, 128, 1.0, "host", "float32", "row_adagrad", 1),
    head_case(1_000_000, 128, 0.1, "file", "bf16", "row_adamw", 1),
    head_case(1_000_000, 128, 1.0, "device", "float32", "row_adagrad", 2),
)
"""Every storage, dtype and row optimizer, rates from 1 to 1/64, one rank and two; and the trainer's step."""


class Steps(NamedTuple):
    """A step, what makes its arguments, and whether it works in one thread on a CPU."""

    step: Callable[..., object]
    prepare: Callable[[], tuple[Tensor, ...]]
    alone: bool

    def time(self, rank: Rank, steps: int, warmup: int = 2) -> tuple[list[float], list[float]]:
        """Seconds of each: by the clock; and those of the rank's processor, without what else the machine does at the
        same time. On a GPU, and with several threads (one that reads rows too), by the clock both times."""
        own: list[float] = []

        def timed(*arguments: Tensor) -> None:
            begin = time.process_time()
            self.step(*arguments)
            own.append(time.process_time() - begin)

        clock = rank.time_steps(timed, steps, warmup, self.prepare)
        return clock, own[warmup:] if self.alone and torch.get_num_threads() == 1 else clock


def head_steps(rank: Rank, config: Config) -> Steps:
    """Those of a head on random embeddings."""
    module = build.build_head(config, World(rank.number, rank.size, rank.device))
    head = Head(module, build.build_head_optimizer(config, module))
    size, dim = config.data.batch_size, config.backbone.embedding_dim

    def batch() -> tuple[Tensor, Tensor]:
        embeddings = torch.randn(size, dim, device=rank.device, requires_grad=True)
        return embeddings, torch.randint(0, module.num_classes, (size,), device=rank.device)

    return Steps(head.step, batch, alone=rank.device.type == "cpu" and module.staged is None)


def whole_steps(rank: Rank, config: Config) -> Steps:
    """The trainer's, on noise."""
    world = World(rank.number, rank.size, rank.device)
    training = TrainingStep(config, build.build_parts(config, world), world)
    images = torch.rand(config.data.batch_size, 3, *build.input_size(config), device=rank.device)

    def batch() -> tuple[Tensor, Tensor]:
        return images, torch.randint(0, config.head.num_classes or 1, images.shape[:1], device=rank.device)

    def step(images: Tensor, labels: Tensor) -> None:
        training.micro_batch(images, labels, last=True)
        training.update()

    return Steps(step, batch, alone=rank.device.type == "cpu")
