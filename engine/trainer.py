"""The training loop: build everything from the configuration, step, tell, save, evaluate."""

import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..data.errors import UsageError
from ..data.loading.batches import Batch
from . import build, initial, label_map, training_data
from .checkpoint import state as run_state
from .checkpoint.manager import Saving
from .config import Config
from .device import consult_every
from .diagnosis import NotFinite, diagnose
from .evaluation.sets import EvaluationSets
from .log import lines
from .log.damage import DamageTally
from .log.loggers import open_loggers
from .log.profile import StepProfile
from .log.telemetry import Telemetry, Throughput
from .ranks import distributed
from .ranks.distributed import World
from .ranks.stopping import EXIT_CODES, signal_of, stop_requests
from .report.write import write_report
from .schedule import set_rates
from .spikes import Rollback, SpikeWatch
from .start import agree
from .training_step import TrainingStep

REQUEUE = "requeue"
"""A file of this name in a run's directory says that the run was stopped by SIGUSR1 and wants to go on."""


def train(config: Config, resume: str = "auto") -> int:
    """Trains one run to its end; on every rank.

    Args:
        config: what to do.
        resume: where to begin, see ``start.agree``.

    Returns:
        The exit code: 0 done, 143 stopped by SIGTERM and 75 by SIGUSR1 after saving, 1 where the end was not saved.

    Raises:
        UsageError: something that does not fit together, in one line.
        NotFinite: too many steps in a row were skipped.
        PeerFailed: another rank failed before.
    """
    run = config.run
    with (
        distributed.start(run.timeout_seconds, bind_to_cores=run.bind_to_cores) as world,
        stop_requests() as requests,
    ):
        trainer = Trainer(config, world, resume)
        try:
            while trainer.step < trainer.total_steps:
                trainer.train_step()
                number = trainer.consult(requests.most)
                if number is not None and trainer.step < trainer.total_steps:
                    trainer.stop(number)
                    return EXIT_CODES[number]
                if trainer.save_wanted:
                    trainer.save()
            return trainer.finish()
        finally:
            trainer.close()


class Trainer:
    """Everything that a run consists of, on one rank.

    Attributes:
        step: optimizer steps done.
        total_steps: how many there will be.
        save_wanted: whether a checkpoint is due by the clock, as of the last time that ``consult`` asked.
    """

    def __init__(self, config: Config, world: World, resume: str) -> None:
        self.world, self.heartbeat = world, world.heartbeat
        self.heartbeat.enter("opening the data", on_files=True)
        self.run_dir = config.run.path
        self.dataset = training_data.open_dataset(config)
        self.sets = EvaluationSets(config)
        self.loggers = open_loggers(config)
        self.start = agree(config, world, resume)
        self.config = config = build.completed(config, self.dataset)
        self.images_per_step = config.images_per_step(world.size)

        self.heartbeat.enter("building the network and the head", on_files=True)
        torch.manual_seed(config.run.seed)
        weights = training_data.read_class_weights(config, self.dataset)
        self.parts = parts = build.build_parts(
            config, world, initialise=self.start.found is None, class_weights=weights
        )
        self.network, self.head = parts.network, parts.head
        self.backbone_optimizer, self.head_optimizer = parts.backbone_optimizer, parts.head_optimizer
        self.labels = labels = label_map.read_label_map(self.dataset)
        if self.start.found is not None:
            state, told = run_state.restore(parts, self.start.found, world, config, labels)
            told += self.start.told()
        else:
            state, told = {}, initial.begin(config, parts, labels)
            run_state.seed_generators(config.run.seed, world.rank)
        self.step = state.get("step", 0)
        self.training_step = TrainingStep(config, parts, world, self.step, state.get("skipped_steps", 0))
        self.skipped_steps = self.training_step.skipped_steps  # the tensor itself, counted there
        self.batches: list[Batch] = []  # of the last step, for the diagnosis
        self.first_head_step = 0
        self.loader = training_data.build_loader(
            config, self.dataset, world, image_size=build.input_size(config), position=state.get("position", 0)
        )
        self.total_steps = self._steps_of_run()
        self.telemetry = self._telemetry()
        with ExitStack() as undo:
            undo.callback(self.telemetry.close)  # unless all of the following is there
            self.spikes = self.rollback = None
            if config.spike is not None:
                self.spikes = SpikeWatch(config.spike)
                self.rollback = Rollback(config.spike, self.run_dir, state.get("rollbacks", 0), self.telemetry.message)
            self.damage = DamageTally(self.run_dir, state, world.is_main, self.telemetry.message)
            self.throughput = Throughput()
            self.profile = StepProfile(config.log.profile, self.run_dir, world)
            self.finished = False
            self.loss_sum = torch.zeros((), device=world.device)
            self.loss_count = 0
            self.save_wanted = False
            self.consult_every = consult_every(config.run.consult_every_steps, world.device)
            if world.is_main:
                (self.run_dir / REQUEUE).unlink(missing_ok=True)
                (self.run_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            for line in lines.opening(
                config, self.dataset, self.loader.epoch_size, self.network, world, self.total_steps, self.start.found
            ):
                self.telemetry.message(line)
            for line in told:
                self.telemetry.message(line)
            self.saving = Saving(
                config, parts, world, labels, self.sets.names, self.telemetry.message, self.telemetry.checkpoint
            )
            if self.step == 0:
                self.evaluate()
            self.throughput.restart()
            undo.pop_all()

    def train_step(self) -> None:
        """One optimizer step, and whatever is due after it."""
        config = self.config
        self.profile.begin(self.step + 1)
        rate = set_rates(config, self.parts, self.step, self.total_steps)
        self.training_step.begin(self.step)
        self.batches.clear()
        self.first_head_step = self.head.steps
        for micro in range(config.optimizer.accumulate):
            self.heartbeat.enter("waiting for a batch", self.step + 1)
            with self.throughput.waiting():
                batch = next(self.loader)
            self.batches.append(batch)
            last = micro + 1 == config.optimizer.accumulate
            self.loss_sum += self.training_step.micro_batch(batch.images, batch.labels, last=last)
            self.loss_count += 1
        norm = self.training_step.update()
        self.step += 1
        if self.spikes is not None:
            self.spikes.add(self.step, self.training_step.loss)
        self.throughput.count(self.images_per_step)
        done = self.step == self.total_steps
        if self.step % config.log.every_steps == 0 or self.step == 1 or done:
            self._log(rate, norm)
        if self.step % config.evaluation.every_steps == 0 or done:
            self.evaluate()
        if self.saving.due(self.step) or done:
            self.save()
        self.saving.saver.poll()
        self._profile(self.profile.end, self.step)

    def consult(self, most: int = 0) -> signal.Signals | None:
        """What the ranks decide together after every ``run.consult_every_steps``: the host waits for all of them.

        Args:
            most: what this rank was asked for, see ``StopRequests.most``.

        Returns:
            the signal that the run shall stop by.

        Raises:
            NotFinite: too many steps in a row were skipped.
        """
        self.save_wanted = False
        if self.step % self.consult_every and self.step < self.total_steps:
            return None
        self.heartbeat.enter("consulting the other ranks")
        spike = self.spikes.find() if self.spikes is not None else None
        most, save, skipped, spiked = self.world.largest(
            most, self.saving.due_by_clock(), self.training_step.skipped_lately(), spike.step if spike else 0
        )
        if skipped >= self.config.max_skipped_in_a_row:
            self._end_if_still_skipping()
        if spiked:
            self._meet_spike(spiked, str(spike or "a loss"))
        self.save_wanted = bool(save)
        return signal_of(most)

    def stop(self, number: signal.Signals) -> None:
        """Saves, and says that the run is not at its end."""
        self.save()
        self.saving.saver.wait()
        self.telemetry.message(f"stopped by {number.name} at step {self.step:,}; the same command goes on")
        if number == signal.SIGUSR1 and self.world.is_main:
            (self.run_dir / REQUEUE).touch()

    def evaluate(self) -> None:
        """What the sets say, by all ranks."""
        average = self.parts.average
        for result, seconds in self.sets.evaluate(
            self.network if average is None else average.network,
            self.config,
            self.world,
            step=self.step,
            last=self.step == self.total_steps,
            autocast=self.training_step.autocast,
            tolerating=self.telemetry.tolerating,
            message=self.telemetry.message,
        ):
            values = {**result.to_dict(), "seconds": seconds}
            self.telemetry.evaluation(self.step, values)
            self.saving.measured(self.step, result.set, values)
            self.telemetry.message(lines.evaluated(values, self.step))
        self.throughput.restart()

    def save(self) -> None:
        """Writes a checkpoint, or where ``checkpoint.asynchronous`` begins to."""
        self.heartbeat.enter("saving", on_files=True)
        self.damage.collect(self.loader)
        counters = {
            "origin": self.start.origin,
            "position": self.loader.position,
            "skipped_steps": int(self.skipped_steps),
            "rollbacks": self.rollback.count if self.rollback is not None else 0,
            **self.damage.state(),
        }
        self.saving.save(self.step, counters)
        self.throughput.restart()

    def finish(self) -> int:
        """The report, and the lines that a person looks for at the end; returns the exit code."""
        self.heartbeat.enter("saving, and writing the report", on_files=True)
        self.saving.saver.wait()
        if self.world.is_main:
            with self.telemetry.tolerating(self.run_dir / "report.html"):
                report = write_report(self.run_dir)
                for line in lines.closing(self.run_dir, report, self.sets.names, self.damage):
                    self.telemetry.message(line)
        self.finished = True
        if (problem := self.saving.saver.last_problem) is None:
            return 0
        self.telemetry.message(
            f"the end of the run is NOT saved: {problem}; free disk space, then run the same command again"
        )
        return 1

    def close(self) -> None:
        self.saving.saver.close()
        self._profile(self.profile.close)
        self.telemetry.close(finished=self.finished)
        self.loader.close()

    def _profile(self, what: Callable[..., None], *arguments: int) -> None:
        """A profile that cannot be written is told."""
        try:
            what(*arguments)
        except Exception as error:
            self.telemetry.message(f"warning    log.profile: {type(error).__name__}: {error}; training goes on")

    def _end_if_still_skipping(self) -> None:
        """Raises NotFinite unless a later step was a good one: a GPU told of the steps up to the last question."""
        skipped = int(self.training_step.skipped_in_a_row)  # waits for the device, the same on every rank
        if skipped < self.config.max_skipped_in_a_row:
            return
        # The last step changed nothing, so its batch meets the parameters that it met before.
        found = diagnose(self.training_step, self.batches, self.dataset, self.first_head_step)
        raise NotFinite(
            f"{skipped} steps in a row were skipped, the last one step {self.step:,}, because the loss or a "
            f"gradient was not finite (optimizer.max_skipped_in_a_row)\n  {found}"
        )

    def _meet_spike(self, step: int, what: str) -> None:
        """Goes back to the last checkpoint before ``step``, and on with later data, where the configuration says so."""
        assert self.spikes is not None
        assert self.rollback is not None
        told = f"spike      {what}, found at step {self.step:,}"
        self.spikes.restart()
        self.saving.saver.wait()
        self.heartbeat.enter("going back to a checkpoint", on_files=True)
        found = self.rollback.target(step, told)
        if found is None:
            return
        self.saving.saver.last_step = found.step
        state, _ = run_state.restore(self.parts, found, self.world, self.config, self.labels)
        left_out = self.loader.position - state["position"]
        self.telemetry.message(f"{told}; back to {found.path}, without the {left_out:,} images that came after it")
        self.step = state["step"]
        self.loss_sum.zero_()
        self.loss_count = 0
        self._profile(self.profile.close)
        self.telemetry.rollback(self.step)
        self.throughput.restart()

    def _telemetry(self) -> Telemetry:
        return Telemetry(
            self.run_dir,
            total_steps=self.total_steps,
            world_size=self.world.size,
            is_main=self.world.is_main,
            rank=self.world.rank,
            resumed_step=self.step,
            hooks=self.loggers,
            config=self.config.model_dump(),
        )

    def _steps_of_run(self) -> int:
        """By the schedule; epochs are counted from where the data stand, so that they stay whole at another batch."""
        schedule = self.config.schedule
        if schedule.epochs is None:
            assert schedule.steps is not None
            return schedule.steps
        before = self.step if self.loader.position else 0  # a converted checkpoint has steps, and its data start over
        steps = before + -(-self.loader.batches_until(schedule.epochs) // self.config.optimizer.accumulate)
        if schedule.warmup_steps > steps:  # of a run with ``steps`` the configuration itself refuses it
            self.loader.close()
            raise UsageError(
                f"schedule.warmup_steps ({schedule.warmup_steps:,}) is more than the {steps:,} steps of "
                f"{schedule.epochs:g} epochs: take fewer"
            )
        return steps

    def _log(self, rate: float, norm: Tensor) -> None:
        self.damage.collect(self.loader)
        # One question to the device; it waits for it, so the clock below is right.
        loss_sum, norm_value, skipped = torch.stack([self.loss_sum, norm, self.skipped_steps]).tolist()
        speed = self.throughput.take()
        values: dict[str, Any] = {
            "loss": loss_sum / self.loss_count,
            "lr": rate,
            **speed,
            "images_per_second_per_rank": speed["images_per_second"] / self.world.size,
            "epoch": self.loader.epoch,
            "gradient_norm": norm_value,
            "sample_rate": self.head.sample_rate,
            "skipped_steps": int(skipped),
            **self.damage.metrics(),
            **self.saving.metrics(),
        }
        if self.rollback is not None:
            values["rollbacks"] = self.rollback.count
        if self.parts.scaler.is_enabled():
            values["loss_scale"] = self.parts.scaler.get_scale()
        self.telemetry.log(self.step, values)
        self.loss_sum.zero_()
        self.loss_count = 0
