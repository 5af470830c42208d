"""When a run saves, which checkpoint is the best, and whether the disk has room."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...data.errors import UsageError
from .. import checkpoint
from ..build import Parts
from ..config import Config
from ..ranks.distributed import World
from . import Best, Saver
from . import state as run_state
from .directory import EVALUATION, FOLDER


class Saving:
    """The checkpoints of one run, on one rank; made by all ranks together, before the first step.

    Args:
        config: of the run, completed.
        parts: what is trained.
        world: this rank's place.
        labels: the label map of the data set.
        sets: names of the verification sets.
        message: prints a line, on one rank.

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
            device=world.device,
        )
        champion = self.best.of(checkpoint.find_all(self._run_dir)) if self.best is not None else None
        value = self.best.value(champion.state()) if self.best is not None and champion is not None else None
        self._champion = checkpoint.from_first_rank(value)  # it decides when all save together
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
            raise UsageError(
                f"checkpoint.best.metric: {self.best.metric} is not measured on {name!r} (it has {values['pairs']:,} "
                f"pairs), but {', '.join(key for key in values if key not in ('set', 'pairs', 'threshold'))} are"
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
        problem = checkpoint.agreed(problem)
        if problem is not None:
            raise UsageError(problem)
        if warning is not None:
            message(f"warning    {warning}")


def _best(config: Config, sets: Sequence[str]) -> Best | None:
    section = config.checkpoint.best
    if section is None:
        return None
    if not sets:
        raise UsageError("checkpoint.best: nothing is evaluated; give evaluation.pairs, or leave checkpoint.best out")
    name = section.set or sets[0]
    if name not in sets:
        raise UsageError(f"checkpoint.best.set: {name!r} is none of evaluation.pairs: {', '.join(sets)}")
    return Best(section.metric, name, section.mode or ("min" if section.metric == "eer" else "max"))


def check_space(run_dir: Path, size: int, keep: int, *, best: bool) -> str | None:
    """Looks at the file system of the run's directory, which is made if it is missing.

    A checkpoint is written while those before it are still there, so ``keep`` of them take ``keep + 1`` places.

    Args:
        run_dir: of the run.
        size: bytes of one checkpoint, of all ranks.
        keep: how many stay.
        best: whether the best one stays too.

    Returns:
        A warning, where one fits but not all.

    Raises:
        UsageError: not even one and its successor fit, or the directory cannot be written.
    """
    folder = run_dir / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free + _bytes_in(folder)
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder}: {error.strerror}: no checkpoint can be written there; give another run.dir"
        ) from None
    if free < 2 * size:
        raise UsageError(
            f"{folder}: a checkpoint takes {told(size)} and the next one is written beside it, but only {told(free)} "
            "are free: make room, or give a run.dir on another disk"
        )
    places = keep + 1 + best
    if free < places * size:
        return (
            f"{folder}: {told(free)} are free, and {places} checkpoints of {told(size)} (the {keep} that are kept"
            f"{', the best' if best else ''} and the one being written) take {told(places * size)}: lower "
            "checkpoint.keep, or make room"
        )
    return None


def told(size: float) -> str:
    """A number of bytes: ``2.1 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _bytes_in(folder: Path) -> int:
    """Of what is there, which will have given way to newer ones by then."""
    return sum(
        os.path.getsize(os.path.join(where, name))
        for where, _, names in os.walk(folder)
        for name in names
        if os.path.isfile(os.path.join(where, name))
    )
