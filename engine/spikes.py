"""Losses far above those before them."""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import config


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
        """The window fills anew."""
        self._losses.clear()
        self._new.clear()
