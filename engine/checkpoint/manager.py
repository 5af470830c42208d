"""When a run saves, while training waits or while it goes on; which checkpoint is the best so far."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ...data.errors import UsageError
from .. import device as devices
from ..build import Parts
from ..config import Config
from ..ranks.distributed import World
from . import state as run_state
from .directory import EVALUATION, FOLDER, Best, check_space, find_all, find_latest, name_of
from .writing import Content, agreed, from_first_rank, write

_CPU = torch.device("cpu")
_TIMEOUT = timedelta(minutes=30)  # for the slowest rank's part to reach the disk


class Saving:
    """The checkpoints of one run, on one rank; made by all ranks together, before the first step.

    Args:
        config: of the run, completed.
        parts: what is trained.
        world: this rank's place.
        labels: the label map of the data set.
        sets: names of the verification sets.
        message: prints a line, on one rank.
        saved: hears of every complete checkpoint: its step, and its folder.

    Raises:
        UsageError: there is no room for checkpoints, or what makes one the best is not measured.
    """

    def __init__(
        self,
        config: Config,
        parts: Parts,
        world: World,
        labels: bytes | None,
        sets: Sequence[str],
        message: Callable[[str], None],
        saved: Callable[[int, Path], None] = lambda step, folder: None,
    ) -> None:
        self._config, self._parts, self._world, self._labels = config, parts, world, labels
        section, self._run_dir = config.checkpoint, config.run.path
        self.best = _best(config, sets)
        self._check_space(message)
        self.saver = Saver(
            self._run_dir,
            keep=section.keep,
            best=self.best,
            asynchronous=section.asynchronous,
            message=message,
            saved=saved,
            device=world.device,
        )
        champion = self.best.of(find_all(self._run_dir)) if self.best is not None else None
        value = self.best.value(champion.state()) if self.best is not None and champion is not None else None
        self._champion = from_first_rank(value)  # it decides when all save together
        self._measured: dict[str, Any] = {}
        self._measured_at = -1
        self._better = False
        self._saved_at = time.monotonic()

    def measured(self, step: int, name: str, values: dict[str, Any]) -> None:
        """Takes note of an evaluation, the same on every rank.

        Raises:
            UsageError: the metric that makes the best is not among its values.
        """
        if step != self._measured_at:
            self._measured, self._measured_at = {}, step
        self._measured[name] = values
        if self.best is None or name != self.best.set:
            return
        if self.best.metric not in values:
            measured = [key for key in values if isinstance(values[key], float) and key not in ("threshold", "seconds")]
            raise UsageError(
                f"checkpoint.best.metric: {self.best.metric} is not measured on {name!r}, but {', '.join(measured)} are"
            )
        value = float(values[self.best.metric])
        if step > 0 and (self._champion is None or self.best.beats(value, self._champion)):
            self._champion, self._better = value, True

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after that step, by the number of steps or because it is the best so far."""
        return self._better or step % self._config.checkpoint.every_steps == 0

    def due_by_clock(self) -> bool:
        """Whether one is due by this rank's clock; the first rank's decides, so it must be asked of all together."""
        minutes = self._config.checkpoint.every_minutes
        return minutes is not None and self._world.is_main and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, step: int, counters: dict[str, Any]) -> None:
        """Saves what there is after that step, unless it is saved already; all ranks together."""
        self._saved_at, self._better = time.monotonic(), False
        if self.saver.last_step == step and self.saver.last_problem is None:
            return
        measured = self._measured if self._measured_at == step else {}
        counters = {**counters, EVALUATION: measured}
        self.saver.save(run_state.capture(self._parts, self._world, self._config, step, self._labels, counters))

    def metrics(self) -> dict[str, Any]:
        """For metrics.jsonl: what saves cost and how many failed."""
        return {
            "checkpoint_stall_seconds": round(self.saver.take_stalled(), 3),
            "checkpoints_failed": self.saver.failed,
        }

    def _check_space(self, message: Callable[[str], None]) -> None:
        size, section = run_state.size_of(self._parts, self._world), self._config.checkpoint
        problem = warning = None
        if self._world.is_main:
            try:
                warning = check_space(self._run_dir, size, section.keep, best=section.best is not None)
            except UsageError as error:
                problem = str(error)
        problem = agreed(problem)
        if problem is not None:
            raise UsageError(problem)
        if warning is not None:
            message(f"warning    {warning}")


def _best(config: Config, sets: Sequence[str]) -> Best | None:
    section = config.checkpoint.best
    if section is None:
        return None
    if not sets:
        raise UsageError(
            "checkpoint.best: nothing is evaluated; give evaluation.pairs or evaluation.sets, or leave it out"
        )
    name = section.set or sets[0]
    if name not in sets:
        raise UsageError(
            f"checkpoint.best.set: {name!r} is none of evaluation.pairs and evaluation.sets: {', '.join(sets)}"
        )
    return Best(section.metric, name, section.mode or ("min" if section.metric in ("eer", "min_dcf") else "max"))


class Saver:
    """One rank's part in the saves of a run; every method but ``poll`` and ``close`` is called by all ranks together.

    What the disk refuses (it is full, a quota, a permission) is told in a line and counted, and training goes on with
    the checkpoints that there are. Any other error is raised, of an asynchronous save at the next call.

    An asynchronous save copies the state into host memory, which stays allocated for the next one, and writes it in a
    thread with a gloo group of its own, so that its messages and those of training cannot meet. There is never more
    than one: the next waits for it. (``dcp.async_save`` and its stagers are declared experimental; the fsync and the
    renaming that follow would need a thread all the same.)

    Args:
        run_dir: of the run.
        keep: how many of the latest checkpoints stay.
        best: what makes a checkpoint the best, which stays too; None where none is named.
        device: where this rank computes.
        asynchronous: whether training goes on while they are written.
        message: prints a line, on one rank.
        saved: hears of every complete checkpoint: its step, and its folder.

    Attributes:
        failed: how many saves came to nothing.
        last_problem: why the last one did, None where it did not.
        last_step: the step of the last save that was begun; -1 before the first.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        best: Best | None,
        asynchronous: bool,
        message: Callable[[str], None],
        saved: Callable[[int, Path], None] = lambda step, folder: None,
        device: torch.device = _CPU,
    ) -> None:
        self._run_dir, self._keep, self._best, self._device = run_dir, keep, best, device
        self._asynchronous, self._message, self._saved = asynchronous, message, saved
        self._group: dist.ProcessGroup | None = None
        if asynchronous:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_TIMEOUT))
        self._buffers: dict[str, Tensor] = {}
        self._running: Future[str | None] | None = None
        self._stalled = 0.0
        self.failed = 0
        self.last_problem: str | None = None
        self.last_step = -1

    def save(self, content: Content) -> None:
        """Saves, or begins to; returns when training may go on."""
        begin = time.perf_counter()
        self.wait()
        self.last_step = content.step
        if self._asynchronous:
            self._begin(self._staged(content))
        else:
            self._finished(content.step, self._write(content))
        stalled = time.perf_counter() - begin
        self._stalled += stalled
        if self._asynchronous:
            self._message(f"checkpoint {name_of(content.step)} is being written; training waited {stalled:.2f} s")
        elif self.last_problem is None:
            self._message(f"checkpoint {name_of(content.step)} saved; training waited {stalled:.2f} s")

    def poll(self) -> None:
        """Reports an asynchronous save that has ended."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Until the asynchronous save, if there is one, has ended."""
        running, self._running = self._running, None
        if running is None:
            return
        if (error := running.exception()) is not None:
            raise RuntimeError(f"saving {name_of(self.last_step)} failed") from error
        self._finished(self.last_step, running.result())

    def take_stalled(self) -> float:
        """Seconds that training waited for saves since the last call."""
        stalled, self._stalled = self._stalled, 0.0
        return stalled

    def close(self) -> None:
        """Gives the group back; a save that still runs, which after an error may never end, is left alone."""
        if self._running is None and self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _write(self, content: Content) -> str | None:
        return write(self._run_dir, content, keep=self._keep, best=self._best, group=self._group)

    def _begin(self, content: Content) -> None:
        running: Future[str | None] = Future()

        def run() -> None:
            try:
                devices.use(self._device)  # a new thread's is the first GPU, whatever the rank's is
                running.set_result(self._write(content))
            except BaseException as error:  # CheckpointException is no Exception; raised in wait()
                running.set_exception(error)

        self._running = running
        # A daemon, unlike an executor's thread: the process of a run that failed must not wait for it.
        threading.Thread(target=run, name=f"save-{content.step}", daemon=True).start()

    def _staged(self, content: Content) -> Content:
        """The content with all tensors copied to the host."""
        staged = replace(
            content,
            tensors={name: self._copied(name, tensor) for name, tensor in content.tensors.items()},
            pieces={name: replace(one, rows=self._copied(name, one.rows)) for name, one in content.pieces.items()},
        )
        devices.synchronize(self._device)
        return staged

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = devices.host_buffer(tensor)
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def _finished(self, step: int, problem: str | None) -> None:
        self.last_problem = problem
        if problem is None:
            self._saved(step, self._run_dir / FOLDER / name_of(step))
            return
        self.failed += 1
        good = find_latest(self._run_dir)
        rest = f"the last good one is {good.path.name}" if good is not None else "there is none yet"
        self._message(f"checkpoint {name_of(step)} NOT saved: {problem}; training goes on, {rest}")
