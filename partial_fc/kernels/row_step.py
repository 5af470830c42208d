"""What the row optimizers ask of a pass that steps a block of rows in place: compiled on a CPU, fused on a GPU."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor


class RowStep(ABC):
    """A block of a step's rows with their gradient, to be stepped by one of three rules. Matrices are the shard's."""

    def sgd(
        self,
        weight: Tensor,
        velocity: Tensor | None,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
    ) -> None:
        """``RowSGD`` on rows of the centers [N, D] and their momentum [N, D]; None without momentum."""
        self._run("sgd", [weight, velocity], [lr, momentum, weight_decay, nesterov])

    def adamw(
        self,
        weight: Tensor,
        moments: tuple[Tensor, Tensor],
        steps: Tensor,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """``RowAdamW`` on rows of the centers [N, D], their two moments [N, D] and their counts of steps [N, 1]."""
        self._run("adamw", [weight, *moments, steps], [lr, *betas, eps, weight_decay])

    def adagrad(self, weight: Tensor, total: Tensor, *, lr: float, eps: float, weight_decay: float) -> None:
        """``RowAdagrad`` on rows of the centers [N, D] and their sums of squares [N, 1]."""
        self._run("adagrad", [weight, total], [lr, eps, weight_decay])

    @abstractmethod
    def _run(self, rule: str, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> None: ...
