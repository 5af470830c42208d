"""TensorBoard's files, in the run's folder ``tensorboard``."""

from typing import Any

from ..hooks import Hook, RunInfo, Values, numbers


class TensorBoard(Hook):
    def start(self, run: RunInfo) -> None:
        self.run = run
        self.board = self._open(run.resumed_step)

    def _open(self, resumed_step: int) -> Any | None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one rank needs it
        except ImportError:
            self.run.message("TensorBoard is not installed, so no tensorboard/ is written (pip install tensorboard)")
            return None
        purged = resumed_step + 1 if resumed_step else None
        return SummaryWriter(str(self.run.directory / "tensorboard"), purge_step=purged)

    def step(self, step: int, values: Values) -> None:
        self._write(step, values, "train/")

    def evaluation(self, step: int, values: Values) -> None:
        self._write(step, values, f"evaluation/{values.get('set', '')}/")

    def rollback(self, step: int) -> None:
        self.end(False)
        self.board = self._open(step)

    def end(self, finished: bool) -> None:
        if self.board is not None:
            with self.run.tolerating(self.run.directory / "tensorboard"):
                self.board.close()
            self.board = None

    def _write(self, step: int, values: Values, prefix: str) -> None:
        if self.board is not None:
            with self.run.tolerating(self.run.directory / "tensorboard"):
                for key, value in numbers(values).items():
                    self.board.add_scalar(prefix + key, value, step)
