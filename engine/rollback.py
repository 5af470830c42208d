"""Back to a checkpoint after a spike of the loss, and how often a run may do that."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from . import checkpoint, config
from .checkpoint import Found


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
