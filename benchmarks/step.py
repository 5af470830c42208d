"""Times the whole training step, from images to changed weights, with the trainer's own code (``TrainingStep``)."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..data.errors import UsageError
from ..engine import build, training_data
from ..engine.config import Config, parse_config
from ..engine.ranks.distributed import World
from ..engine.training_step import TrainingStep
from .ceilings import DTYPES
from .head.dense import DenseHead
from .head.heads import LR, MOMENTUM, WEIGHT_DECAY, Head
from .ranks import Rank, run

PHASES: tuple[str, ...] = ("data", "backbone forward", "head forward", "backward", "optimizers")
"""``backward`` is the head's and the backbone's, one call of autograd; ``optimizers`` the update of both."""

_MARKED = 3
"""Steps that are cut into phases, the device idle at each cut; apart from the timed ones, where parts may overlap."""


@dataclass(frozen=True)
class StepFigures:
    """What was measured with one head.

    Attributes:
        head: "pfc" or "dense".
        seconds: of each timed step, on the slowest rank.
        phases: seconds a step of each of ``PHASES``, on average over ranks and steps.
        alone: seconds of a step of the head and its optimizer alone, the median on the slowest rank.
        peak_bytes: of the rank that takes most.
        images: of all ranks in one step.
    """

    head: str
    seconds: list[float]
    phases: dict[str, float]
    alone: float
    peak_bytes: int
    images: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        total = sum(self.phases.values())
        return {
            "head": self.head,
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "images_per_second": self.images / self.median,
            "phases": {name: seconds / total for name, seconds in self.phases.items()},
            "head_alone_s": self.alone,
            "peak_bytes": self.peak_bytes,
        }


def completed(config: Config, with_data: bool) -> Config:
    """The configuration with image size and number of classes filled in: the data set's, or with made-up batches those
    that the configuration gives, whatever the data set has.

    Raises:
        UsageError: they are given nowhere.
    """
    size, classes = config.data.image_size, config.head.num_classes
    if not with_data and size is not None and classes is not None:
        return config
    try:
        dataset = training_data.open_dataset(config)
    except UsageError as error:
        more = "" if with_data else "; without it, give head.num_classes and data.image_size"
        raise UsageError(f"{error}{more}") from None
    if with_data:
        return build.completed(config, dataset)
    free = config.model_copy(update={"head": config.head.model_copy(update={"num_classes": None})})
    full = build.completed(free, dataset)
    return full.model_copy(
        update={"head": full.head.model_copy(update={"num_classes": classes or dataset.num_classes})}
    )


def measure_step(
    config: Config, head: str, *, ranks: int, threads: int, steps: int, warmup: int, with_data: bool
) -> StepFigures:
    """Runs the steps of one head in processes of their own.

    Args:
        config: a completed configuration.
        head: "pfc", or "dense" with the same backbone.
        threads: torch's threads per rank, on a CPU.
        with_data: whether batches come from the configured data set; else one made-up batch is used again and again.

    Raises:
        RankDied: a rank did not come to the end.
    """
    results = run(_measure, ranks, threads, config.model_dump(), head, steps, warmup, with_data)
    seconds = torch.tensor([result["seconds"] for result in results]).amax(dim=0).tolist()
    phases = {name: statistics.fmean(result["phases"][name] for result in results) for name in PHASES}
    alone, peak = (max(result[name] for result in results) for name in ("alone", "peak"))
    return StepFigures(head, seconds, phases, alone, peak, config.images_per_step(ranks))


def _measure(rank: Rank, tree: dict[str, Any], head: str, steps: int, warmup: int, with_data: bool) -> dict[str, Any]:
    config, world = parse_config(tree), World(rank.number, rank.size, rank.device)
    before = rank.reset_peak()
    torch.manual_seed(config.run.seed)
    parts = build.build_parts(config, world) if head == "pfc" else _dense_parts(config, world)
    training = TrainingStep(config, parts, world)
    batches = _Loaded(config, world) if with_data else _MadeUp(config, world)
    seconds = rank.time_steps(lambda: _step(config, training, batches), steps, warmup)
    peak = rank.peak() - before
    clock = _Clock(rank)
    clock.listen(training.backbone, "backbone forward")
    clock.listen(parts.head, "head forward")
    for _ in range(_MARKED):
        rank.wait()
        clock.last = time.perf_counter()
        _step(config, training, batches, clock.mark)
    phases = {name: total / _MARKED for name, total in clock.phases.items()}
    clock.stop()
    alone = _alone(rank, config, parts, steps, warmup)
    return {"seconds": seconds, "phases": phases, "peak": peak, "alone": alone}


def _step(
    config: Config, training: TrainingStep, batches: "_Batches", mark: Callable[[str], None] = lambda _: None
) -> None:
    for micro in range(config.optimizer.accumulate):
        images, labels = batches.next()
        mark("data")
        training.micro_batch(images, labels, last=micro + 1 == config.optimizer.accumulate)
        mark("backward")
    training.update()
    mark("optimizers")


def _alone(rank: Rank, config: Config, parts: build.Parts, steps: int, warmup: int) -> float:
    """Seconds of a step of the head with its optimizer, on random embeddings: the median."""
    size, dim = config.data.batch_size, config.backbone.embedding_dim

    def batch() -> tuple[Tensor, Tensor]:
        embeddings = torch.randn(size, dim, device=rank.device, requires_grad=True)
        return embeddings, torch.randint(0, config.head.num_classes or 1, (size,), device=rank.device)

    head = Head(parts.head, parts.head_optimizer)
    return statistics.median(rank.time_steps(head.step, steps, warmup, prepare=batch))


def _dense_parts(config: Config, world: World) -> build.Parts:
    """The run's parts with the dense head and torch's SGD in place of ours; the same backbone and its optimizer."""
    small = config.model_copy(update={"head": config.head.model_copy(update={"num_classes": 1})})
    parts = build.build_parts(small, world)
    assert config.head.num_classes is not None
    dtype = DTYPES["bf16" if config.precision == "bf16" else "float32"]
    head = DenseHead(config.head.num_classes, config.backbone.embedding_dim, dtype, world.device)
    optimizer = torch.optim.SGD([head.weight], lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    return replace(parts, head=head, head_optimizer=optimizer)  # pyright: ignore[reportArgumentType]


class _Clock:
    """Adds up the time between marks, each with the device idle."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.phases = dict.fromkeys(PHASES, 0.0)
        self.last = 0.0
        self.hooks: list[RemovableHandle] = []

    def mark(self, phase: str) -> None:
        """What has passed since the last mark belongs to ``phase``."""
        self.rank.synchronize()
        now = time.perf_counter()
        self.phases[phase] += now - self.last
        self.last = now

    def listen(self, module: nn.Module, phase: str) -> None:
        """A mark at the end of the module's forward pass."""
        self.hooks.append(module.register_forward_hook(lambda *_: self.mark(phase)))

    def stop(self) -> None:
        """No more marks."""
        for hook in self.hooks:
            hook.remove()


class _Batches(Protocol):
    def next(self) -> tuple[Tensor, Tensor]:
        """Images and labels of this rank's next micro-batch."""
        ...


class _MadeUp:
    """One batch of noise, always the same: no time goes into data."""

    def __init__(self, config: Config, world: World) -> None:
        generator = torch.Generator().manual_seed(world.rank)
        shape = (config.data.batch_size, 3, *build.input_size(config))
        labels = torch.randint(0, config.head.num_classes or 1, shape[:1], generator=generator)
        self.batch = (torch.rand(shape, generator=generator) * 2 - 1).to(world.device), labels.to(world.device)

    def next(self) -> tuple[Tensor, Tensor]:
        return self.batch


class _Loaded:
    """The configured data set, as the trainer reads it."""

    def __init__(self, config: Config, world: World) -> None:
        dataset = training_data.open_dataset(config)
        self.loader = training_data.build_loader(
            config, dataset, world, image_size=build.input_size(config), position=0
        )

    def next(self) -> tuple[Tensor, Tensor]:
        batch = next(self.loader)
        return batch.images, batch.labels
