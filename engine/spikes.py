"""Losses far above those before them, and the way back to a checkpoint from before."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoint, config
from .checkpoint import Found


@dataclass(frozen=True)
class Spike:
    """A step whose loss is far above the median of those before it."""

    step: int
    loss: float
    median: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4f} at step {self.step:,}, after a median of {self.median:.4f}"


class SpikeWatch:
    """Compares each step's loss with the median of the last ones.

    Args:
        section: what counts as a spike.
    """

    def __init__(self, section: config.Spike) -> None:
        self._section = section
        self._new: list[tuple[int, Tensor]] = []
        self._losses: deque[float] = deque(maxlen=section.window)

    def add(self, step: int, loss: Tensor) -> None:
        """Takes a step's loss [], without waiting for the device."""
        self._new.append((step, loss))

    def find(self) -> Spike | None:
        """The first spike among the steps since the last call, at least one. Waits for the device.

        Nothing is a spike before a window is full. A loss that is not finite is none: such a step changes nothing.
        """
        steps, values = [step for step, _ in self._new], torch.stack([loss for _, loss in self._new]).tolist()
        self._new.clear()
        for step, value in zip(steps, values, strict=True):
            if not np.isfinite(value):
                continue
            if len(self._losses) == self._section.window:
                median = float(np.median(self._losses))
                if value > self._section.factor * median:
                    return Spike(step, value, median)
            self._losses.append(value)
        return None

    def restart(self) -> None:
        """The window fills again."""
        self._losses.clear()
        self._new.clear()


class Rollback:
    """Finds the checkpoint to go back to, on all ranks alike.

    Args:
        section: what is done about a spike.
        run_dir: the run's directory.
        count: how often the run has gone back before.
        message: prints a line, on one rank.

    Attributes:
        count: how often the run has gone back.
    """

    def __init__(self, section: config.Spike, run_dir: Path, count: int, message: Callable[[str], None]) -> None:
        self._section, self._run_dir, self._message = section, run_dir, message
        self.count = count

    def target(self, step: int, what: str) -> Found | None:
        """The last checkpoint before ``step``, the later ones removed; None where training goes on, which is told.

        Args:
            step: whose loss was the spike.
            what: to be told.

        Raises:
            RuntimeError: the run has gone back too often.
        """
        checkpoints = checkpoint.find_all(self._run_dir) if self._section.rollback and dist.get_rank() == 0 else []
        found = max((one for one in checkpoints if one.step < step), key=lambda one: one.step, default=None)
        found = checkpoint.from_first_rank(found)  # another may see others, while one is written or removed
        if found is None:
            why = ", there is no checkpoint to go back to" if self._section.rollback else ""
            self._message(f"{what}{why}; training goes on")
            return None
        if self.count == self._section.max_rollbacks:
            raise RuntimeError(
                f"{what}, and the run has gone back {self.count} times already (spike.max_rollbacks): lower the "
                "learning rate, or warm up longer"
            )
        self.count += 1
        # Those with the spike in them: a restart must not find one, wherever this one is killed.
        checkpoint.go_back(found, [one for one in checkpoints if one.step >= step])
        return found
