"""The training loop: build everything from the configuration, step, tell, save, evaluate."""

import inspect
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..data import Pairs, RecordDataset, TrainLoader, read_pairs
from ..data.errors import UsageError
from . import build, checkpoint, distributed, lines, run_state
from .config import Config
from .distributed import World
from .evaluation import evaluate_pairs
from .report import write_report
from .schedule import learning_rate_factor, sample_rate_at
from .telemetry import Telemetry, Throughput

# Each rank keeps the BatchNorm statistics of its own batches; evaluation and checkpoints take rank 0's. Newer torch
# warns about the old name of the switch, older torch does not know the new one.
_SYNC_SWITCHES = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _SYNC_SWITCHES else "broadcast_buffers": False
}
_AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(config: Config, resume: str = "auto") -> int:
    """Trains one run to its end; on every rank.

    Args:
        config: what to do.
        resume: "auto" goes on from the run's latest checkpoint where there is one; "never" starts anew; anything else
            is the path of a checkpoint or run to go on from.

    Returns:
        The exit code: 0 done, 143 stopped by SIGTERM after saving.

    Raises:
        UsageError: something that does not fit together, in one line.
    """
    with distributed.start() as world, _stop_requests() as stopping:
        trainer = Trainer(config, world, resume)
        try:
            while trainer.step < trainer.total_steps:
                trainer.train_step()
                if trainer.stop_wanted(bool(stopping)):
                    trainer.save()
                    trainer.telemetry.message(f"stopped at step {trainer.step:,}, saved; the same command goes on")
                    return 128 + signal.SIGTERM
            trainer.finish()
        finally:
            trainer.close()
    return 0


class Trainer:
    """Everything that a run consists of, on one rank.

    Attributes:
        step: optimizer steps done.
        total_steps: how many there will be.
    """

    def __init__(self, config: Config, world: World, resume: str) -> None:
        self.world = world
        self.run_dir = config.run.path
        self.start = _starting_point(self.run_dir, resume)
        self.dataset = RecordDataset.open(config.data.train)
        self.pairs = _read_pairs(config.evaluation.pairs)
        self.autocast_dtype = _AUTOCAST[config.precision]
        self.config = config = build.completed(config, self.dataset)
        self.image_size = build.input_size(config)
        self.images_per_step = config.images_per_step(world.size)
        if config.schedule.steps is not None:
            self.total_steps = config.schedule.steps
        else:
            self.total_steps = -(-round(config.schedule.epochs * len(self.dataset)) // self.images_per_step)  # type: ignore[operator]

        torch.manual_seed(config.run.seed)
        self.parts = parts = build.build_parts(config, world)
        self.network, self.head, self.scaler = parts.network, parts.head, parts.scaler
        self.backbone_optimizer, self.head_optimizer = parts.backbone_optimizer, parts.head_optimizer
        state = run_state.restore(parts, self.start, world) if self.start is not None else {}
        self.step = state.get("step", 0)
        self.skipped_steps = torch.tensor(state.get("skipped_steps", 0), device=world.device)

        wrapped = torch.compile(self.network) if config.backbone.compile else self.network
        self.backbone = DistributedDataParallel(
            wrapped,  # type: ignore[arg-type]
            device_ids=[world.device] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_NO_BUFFER_SYNC,
        )
        self.loader = TrainLoader(
            self.dataset,
            batch_size=config.data.batch_size,
            image_size=self.image_size,
            rank=world.rank,
            world_size=world.size,
            seed=config.run.seed,
            flip=config.data.flip,
            device=world.device,
            threads=config.data.threads,
            position=state.get("position", 0),
        )
        self.telemetry = Telemetry(
            self.run_dir,
            total_steps=self.total_steps,
            world_size=world.size,
            is_main=world.is_main,
            resumed_step=self.step,
            tensorboard=config.log.tensorboard,
        )
        self.throughput = Throughput()
        self.loss_sum = torch.zeros((), device=world.device)
        self.loss_count = 0
        if world.is_main:
            (self.run_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        for line in lines.opening(config, self.dataset, self.network, world, self.total_steps, self.start):
            self.telemetry.message(line)
        if self.step == 0:
            self.evaluate()
        self.throughput.restart()

    def train_step(self) -> None:
        """One optimizer step, and whatever is due after it."""
        config = self.config
        rate = self._set_learning_rate()
        section = config.head
        self.head.sample_rate = sample_rate_at(
            self.step / self.total_steps, section.sample_rate, section.sample_rate_schedule
        )
        self.backbone.train()
        for micro in range(config.optimizer.accumulate):
            with self.throughput.waiting():
                batch = next(self.loader)
            images = batch.images
            if config.backbone.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            last = micro + 1 == config.optimizer.accumulate
            with nullcontext() if last else self.backbone.no_sync():
                with self._autocast():
                    embeddings = self.backbone(images)
                loss = self.head(embeddings, batch.labels)
                self.scaler.scale(loss / config.optimizer.accumulate).backward()
            self.loss_sum += loss.detach()
            self.loss_count += 1
        norm = self._optimizer_step()
        self.step += 1
        self.throughput.count(self.images_per_step)
        done = self.step == self.total_steps
        if self.step % config.log.every_steps == 0 or self.step == 1 or done:
            self._log(rate, norm)
        if self.step % config.evaluation.every_steps == 0 or done:
            self.evaluate()
        if self.step % config.checkpoint.every_steps == 0 or done:
            self.save()

    def stop_wanted(self, here: bool) -> bool:
        """Whether some rank was asked to stop; all are asked together, on a GPU every tenth step only."""
        if self.world.device.type == "cuda" and self.step % 10:
            return False
        return self.world.any(here)

    def evaluate(self) -> None:
        """Verification accuracy on every set of pairs, by all ranks."""
        for pairs in self.pairs:
            with self._autocast():
                result, cosine = evaluate_pairs(
                    self.network,
                    pairs,
                    image_size=self.image_size,
                    device=self.world.device,
                    batch_size=self.config.evaluation.batch_size,
                    flip=self.config.evaluation.flip,
                    threads=self.config.data.threads,
                )
            self.telemetry.evaluation(self.step, result.to_dict())
            self.telemetry.message(lines.evaluated(result, self.step))
            if self.world.is_main:
                folder = self.run_dir / "evaluation"
                folder.mkdir(exist_ok=True)
                np.savez_compressed(folder / f"{pairs.name}-{self.step:08d}.npz", cosine=cosine, same=pairs.same)
        self.throughput.restart()

    def save(self) -> None:
        """Writes a checkpoint."""
        tensors, state = run_state.capture(self.parts, self.world)
        state |= {"position": self.loader.position, "skipped_steps": int(self.skipped_steps)}
        checkpoint.save(self.run_dir, self.step, tensors, state, self.config, self.config.checkpoint.keep)
        self.throughput.restart()

    def finish(self) -> None:
        """The report, and the lines that a person looks for at the end."""
        if self.world.is_main:
            report = write_report(self.run_dir)
            for line in lines.closing(self.run_dir, report, [pairs.name for pairs in self.pairs]):
                self.telemetry.message(line)

    def close(self) -> None:
        self.telemetry.close()
        self.loader.close()

    def _optimizer_step(self) -> Tensor:
        """Applies the gradients, or on every rank nothing where they are not finite; returns the backbone's norm []."""
        self.scaler.unscale_(self.backbone_optimizer)
        self.scaler.unscale_(self.head_optimizer)
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), self.config.optimizer.clip_norm, norm)
        assert self.head.gradient_scale.grad is not None
        broken = ~(torch.isfinite(norm) & torch.isfinite(self.head.gradient_scale.grad))
        self.skipped_steps += broken
        for optimizer in (self.backbone_optimizer, self.head_optimizer):
            if self.world.device.type == "cuda":
                # The fused kernels read it on the device.
                optimizer.found_inf = broken.float()  # pyright: ignore[reportAttributeAccessIssue]
                optimizer.step()
            elif not broken:
                optimizer.step()
            optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler.update()
        return norm

    def _set_learning_rate(self) -> float:
        schedule = self.config.schedule
        factor = learning_rate_factor(
            self.step,
            steps=self.total_steps,
            warmup_steps=schedule.warmup_steps,
            name=schedule.name,
            power=schedule.power,
            final=schedule.final,
        )
        section = self.config.optimizer
        for optimizer, peak in ((self.backbone_optimizer, section.backbone.lr), (self.head_optimizer, section.head.lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        return section.backbone.lr * factor

    def _log(self, rate: float, norm: Tensor) -> None:
        loss = float(self.loss_sum) / self.loss_count  # waits for the device, so the clock below is right
        speed = self.throughput.take()
        values: dict[str, Any] = {
            "loss": loss,
            "lr": rate,
            **speed,
            "images_per_second_per_rank": speed["images_per_second"] / self.world.size,
            "epoch": self.loader.position / len(self.dataset),
            "gradient_norm": float(norm),
            "sample_rate": self.head.sample_rate,
            "skipped_steps": int(self.skipped_steps),
        }
        if self.scaler.is_enabled():
            values["loss_scale"] = self.scaler.get_scale()
        self.telemetry.log(self.step, values)
        self.loss_sum.zero_()
        self.loss_count = 0

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)


def _starting_point(run_dir: Path, resume: str) -> checkpoint.Found | None:
    latest = checkpoint.find_all(run_dir)[-1:]
    if resume == "auto":
        return latest[0] if latest else None
    if resume == "never":
        if latest:
            raise UsageError(
                f"{run_dir} holds a run that got to step {latest[0].step}: go on with --resume auto, give run.name "
                "another name, or move it away"
            )
        return None
    return checkpoint.find(Path(resume))


def _read_pairs(paths: list[str]) -> list[Pairs]:
    sets = [read_pairs(path) for path in paths]
    names = [pairs.name for pairs in sets]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"evaluation.pairs: two sets are called {name!r}: rename one of the files")
    return sets


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects SIGTERM instead of dying of it, so that the step in hand can be finished and saved."""
    received: list[int] = []

    def collect(number: int, _: FrameType | None) -> None:
        received.append(number)

    previous = signal.signal(signal.SIGTERM, collect)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
