"""The head's arithmetic, one kernel a file.

A kernel is made for one step. It reduces the negatives' cosines to one number per sample, and later turns the slope of
the loss by that number into the two gradients; see ``NegativesKernel``. ``cosines.py`` and ``gram.py`` are plain;
``blocked.py`` is the fast twin of ``cosines.LogSumExp`` on a CPU.

Shapes: B samples that meet the negatives, K sampled classes of this rank, D the dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from .hard import HardNegatives
from .products import ComputeDtype
from .rows import OwnClasses, SampledRows

if TYPE_CHECKING:
    from .probabilities import KeepBudget


@dataclass(frozen=True)
class KernelSetup:
    """What a step tells the kernel that is made for it.

    Attributes:
        batch: B; dim: D; rows: K.
        compute_dtype: of the matrix products.
        budget: the memory that kept probabilities may take between the forward pass and the row update.
        hard: negatives that count with another cosine; None for none.
        state: the head's numbers for the objective, name → [].
        sub_centers: rows a class, next to each other; the nearest one counts, and it alone has a gradient.
        fused: whether the objective said that the fused kernels can take the step.
    """

    batch: int
    dim: int
    rows: int
    compute_dtype: ComputeDtype
    budget: "KeepBudget"
    hard: HardNegatives | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    sub_centers: int = 1
    fused: bool = False


class UnitGradient(Protocol):
    """(∂loss/∂ŵ)/‖w‖ over the negatives, the form that the backward of normalising takes; by blocks of rows.

    Attributes:
        needs_rows: whether ``block`` needs the centers.
    """

    needs_rows: bool

    def block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        """Its part for the places [start, stop) of the K, [n, D], which the caller may change until the next call.

        Args:
            rows: the centers there, [n, D]; may be None where they are not needed.
        """
        ...


class NegativesKernel(Protocol):
    """One reduction over the negatives, of one step on one rank.

    Attributes:
        sums: S, how many sums over the negatives a sample needs.
    """

    sums: int

    def forward(self, unit: Tensor, rows: SampledRows, own: OwnClasses, *, backward: bool) -> Tensor:
        """This rank's part of the sums over the negatives, float64 [S, B], to be added to the other ranks'.

        Args:
            unit: normalised embeddings [B, D].
            rows: the centers [K, D] as they are stored; their inverse norms are measured on the way.
            own: the samples' own classes, which are no negatives; counted in classes, not in rows.
            backward: whether ``backward`` will follow. Where it will not, less may be computed and stored.
        """
        ...

    def finish(self, summed: Tensor) -> Tensor:
        """What the objective receives, float64 [B], from the sums over all ranks [S, B]."""
        ...

    def attach(self, total: Tensor) -> Tensor:
        """``total`` as a function of the numbers in ``KernelSetup.state`` that need a gradient."""
        ...

    def backward(self, total: Tensor, slope: Tensor) -> tuple[Tensor, UnitGradient]:
        """∂loss/∂unit [B, D] by this rank's classes, and what makes the rows' gradient. May be called once.

        Args:
            total: what ``finish`` returned, float64 [B].
            slope: ∂loss/∂total, float64 [B].
        """
        ...


class Once:
    """What ``forward`` keeps for ``backward``, which may take it once: it is changed there, or freed."""

    def __init__(self) -> None:
        self._kept: tuple | None = None

    def keep(self, *values: object) -> None:
        self._kept = values

    def take(self) -> tuple:
        if self._kept is None:
            raise RuntimeError("backward through the head a second time: call the head again for another backward pass")
        kept, self._kept = self._kept, None
        return kept


class KernelBase:
    """What the kernels have in common, and what most of them do with the sums."""

    sums = 1

    def __init__(self, setup: KernelSetup) -> None:
        self.compute_dtype: ComputeDtype = setup.compute_dtype
        self.hard = setup.hard
        self.sub_centers = setup.sub_centers
        self.saved = Once()

    def finish(self, summed: Tensor) -> Tensor:
        return summed[0]

    def attach(self, total: Tensor) -> Tensor:
        return total
