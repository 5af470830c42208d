"""The interface by which everything that is told of a run hears of it: files, TensorBoard, the progress line, loggers.

``log.loggers`` names them: one of pfc's (``tensorboard``, ``wandb``, ``mlflow``), or ``MODULE:CLASS``, a ``Hook`` in a
file beside the configuration. See docs/logging.md.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Hook", "RunInfo", "Values"]

Values = Mapping[str, Any]
"""Numbers (float, int, bool) and strings, by name."""


@dataclass(frozen=True)
class RunInfo:
    """The run that a hook hears of.

    Attributes:
        directory: of the run; it exists.
        config: complete, as in config.yaml.
        total_steps: of the whole run.
        world_size, rank: of this process.
        resumed_step: the last step that was done before; 0 for a new run.
        message: prints a line.
        tolerating: within it, what the disk refuses to take into a path is told once.
    """

    directory: Path
    config: Mapping[str, Any]
    total_steps: int
    world_size: int
    rank: int
    resumed_step: int
    message: Callable[[str], None]
    tolerating: Callable[[Path], AbstractContextManager[None]]


class Hook:
    """Hears of a run; a subclass overrides what it wants to hear. Options of the configuration go to ``__init__``.

    Called on the first rank alone, in order, between steps: the run waits for it, so do not wait for a network here.
    What a hook raises is told once, and the run goes on; a hook that fails in ``start`` hears no more.
    """

    every_rank = False
    """Whether it hears on every rank."""

    def start(self, run: RunInfo) -> None:
        """Before the first step of this process."""

    def step(self, step: int, values: Values) -> None:
        """What was measured at a step, every ``log.every_steps``: loss, lr, images_per_second, ..."""

    def evaluation(self, step: int, values: Values) -> None:
        """One evaluation: ``set``, the data set's name, and its figures."""

    def checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint is complete in ``folder``."""

    def rollback(self, step: int) -> None:
        """The run goes back to the state after this step: what was told of later ones does not count."""

    def end(self, finished: bool) -> None:
        """The end of this process: all steps are done, or the run was stopped or failed."""


def numbers(values: Values) -> dict[str, float]:
    """The numbers among the values."""
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
