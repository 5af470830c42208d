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
from . import build, checkpoint, distributed
from .config import Config, Objective
from .distributed import World
from .evaluation import VerificationResult, evaluate_pairs
from .report import write_report
from .schedule import learning_rate_factor, sample_rate_at
from .telemetry import Telemetry, Throughput, read_json_lines

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
        self.images_per_step = config.data.batch_size * world.size * config.optimizer.accumulate
        if config.schedule.steps is not None:
            self.total_steps = config.schedule.steps
        else:
            self.total_steps = -(-round(config.schedule.epochs * len(self.dataset)) // self.images_per_step)  # type: ignore[operator]

        torch.manual_seed(config.run.seed)
        self.network = build.build_network(config, world)
        self.head = build.build_head(config, world)
        self.backbone_optimizer = build.build_backbone_optimizer(config, self.network, world.device)
        self.head_optimizer = build.build_head_optimizer(config, self.head)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self.step, position = self._restore()

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
            position=position,
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
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=world.device)
        self._announce()
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
            self.telemetry.message(_evaluation_line(result, self.step))
            if self.world.is_main:
                folder = self.run_dir / "evaluation"
                folder.mkdir(exist_ok=True)
                np.savez_compressed(folder / f"{pairs.name}-{self.step:08d}.npz", cosine=cosine, same=pairs.same)
        self.throughput.restart()

    def save(self) -> None:
        """Writes a checkpoint."""
        head_state = self.head_optimizer.state_dict()["state"]
        tensors: dict[str, Tensor] = {"head/centers": self.head.centers}
        tensors |= {f"head_optimizer/{name}": value for name, value in head_state.items()}
        tensors[f"rng/{self.world.rank}/cpu"] = torch.get_rng_state()
        if self.world.device.type == "cuda":
            tensors[f"rng/{self.world.rank}/cuda"] = torch.cuda.get_rng_state()
        if self.world.is_main:
            tensors |= checkpoint.network_tensors(self.network)
            tensors |= checkpoint.optimizer_tensors(self.network, self.backbone_optimizer)
        state = {
            "position": self.loader.position,
            "head_steps": self.head.steps,
            "num_classes": self.head.num_classes,
            "skipped_steps": int(self.skipped_steps),
            "scaler": self.scaler.state_dict(),
            "world_size": self.world.size,
        }
        checkpoint.save(self.run_dir, self.step, tensors, state, self.config, self.config.checkpoint.keep)
        self.throughput.restart()

    def finish(self) -> None:
        """The report, and the lines that a person looks for at the end."""
        if not self.world.is_main:
            return
        report = write_report(self.run_dir)
        lines = read_json_lines(self.run_dir / "evaluation.jsonl")
        for pairs in self.pairs:
            of_set = [line for line in lines if line["set"] == pairs.name]
            untrained = f"   (untrained network: {of_set[0]['accuracy']:.4f})" if of_set[0]["step"] == 0 else ""
            accuracy, spread = of_set[-1]["accuracy"], of_set[-1]["accuracy_std"]
            self.telemetry.message(f"accuracy   {accuracy:.4f} ± {spread:.4f} on {pairs.name}{untrained}")
        self.telemetry.message(f"run        {self.run_dir}")
        self.telemetry.message(f"report     {report}")

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

    def _restore(self) -> tuple[int, int]:
        """Reads the checkpoint to go on from; returns its step and its position in the data."""
        found = self.start
        if found is None:
            return 0, 0
        state, classes = found.state(), self.head.num_classes
        if state["num_classes"] != classes:
            raise UsageError(
                f"{found.path} has {state['num_classes']} classes, the data set {self.dataset.name!r} has {classes}: "
                "train it under another run.name, or on the data set that it was trained on"
            )
        tensors = checkpoint.network_tensors(self.network) | {"head/centers": self.head.centers}
        head_state = self.head_optimizer.state_dict()
        tensors |= {f"head_optimizer/{name}": value for name, value in head_state["state"].items()}
        _check_shapes(found, tensors)
        further = checkpoint.load(found, tensors, ("backbone_optimizer/", f"rng/{self.world.rank}/"))
        optimizer = {name: value for name, value in further.items() if name.startswith("backbone_optimizer/")}
        checkpoint.restore_optimizer(self.network, self.backbone_optimizer, optimizer)
        for name, value in further.items():
            if name.endswith("/cpu"):
                torch.set_rng_state(value)
            elif name.endswith("/cuda") and self.world.device.type == "cuda":
                torch.cuda.set_rng_state(value)
        self.head.steps = state["head_steps"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        return state["step"], state["position"]

    def _announce(self) -> None:
        """The numbers that a run follows from, once."""
        config, head = self.config, self.head
        if self.world.is_main:
            (self.run_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        epochs = self.total_steps * self.images_per_step / len(self.dataset)
        tell = self.telemetry.message
        tell(f"data       {self.dataset.name}: {len(self.dataset):,} images of {head.num_classes:,} identities")
        tell(
            f"backbone   {config.backbone.name}, {parameters / 1e6:.2f} M parameters, input "
            f"{self.image_size[0]}×{self.image_size[1]}, {config.precision}"
        )
        tell(
            f"head       {_shown(config.head.objective)}, {head.num_classes:,} × {head.embedding_dim} centers over "
            f"{self.world.size} rank(s), sample_rate {config.head.sample_rate:g}, batch_rate {config.head.batch_rate:g}"
        )
        tell(
            f"schedule   {self.total_steps:,} steps of {self.images_per_step:,} images ({epochs:.1f} epochs) on "
            f"{self.world.size} × {self.world.device.type}"
        )
        if self.start is not None:
            tell(f"resumed    {self.start.path}")


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


def _check_shapes(found: checkpoint.Found, tensors: dict[str, Tensor]) -> None:
    saved = found.shapes()
    for name, tensor in tensors.items():
        if name not in saved or saved[name].size != tensor.shape:
            there = list(saved[name].size) if name in saved else "nothing"
            raise UsageError(
                f"{found.path} has another configuration: {name} is {there} there and {list(tensor.shape)} here; "
                "give run.name another name, or go back to the backbone and optimizer that it was trained with"
            )


def _shown(objective: Objective) -> str:
    """``d_softmax (scale 16.0, stop 0.5)``"""
    told = [f"{name} {value}" for name, value in (objective.model_extra or {}).items() if value is not None]
    return f"{objective.name} ({', '.join(told)})" if told else objective.name


def _evaluation_line(result: VerificationResult, step: int) -> str:
    metrics = result.metrics
    parts = [f"evaluated  {result.set} at step {step:,}: accuracy {metrics.accuracy:.4f} ± {metrics.accuracy_std:.4f}"]
    parts += [f"EER {metrics.eer:.4f}"]
    parts += [f"TAR@FAR {level:g} {rate:.4f}" for level, rate in list(metrics.tar_at_far.items())[-1:]]
    return "   ".join(parts)


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
