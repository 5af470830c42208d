"""The head's arithmetic, one kernel a file, in plain torch: the reference of every faster kernel.

A kernel is made for one step. It reduces the negatives' cosines to one number per sample, and later turns the slope of
the loss by that number into the two gradients; see ``NegativesKernel``.
"""

from typing import Protocol

from torch import Tensor


class NegativesKernel(Protocol):
    """One reduction over the negatives, of one step on one rank.

    Shapes: B samples that meet the negatives, K sampled classes of this rank, D the dimension.
    """

    def forward(self, unit: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """This rank's part of the sum over the negatives, float64 [B], to be added to the other ranks'.

        Args:
            unit: normalised embeddings [B, D].
            rows: normalised centers [K, D].
            columns: place of each sample's own class among the K, int64 [B]; −1 where another rank has it. That class
                is no negative.
        """
        ...

    def finish(self, summed: Tensor) -> Tensor:
        """What the objective receives, float64 [B], from the sum over all ranks."""
        ...

    def backward(self, total: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """∂loss/∂unit [B, D] by this rank's classes, and ∂loss/∂rows [K, D]. May be called once.

        Args:
            total: what ``finish`` returned, float64 [B].
            slope: ∂loss/∂total, float64 [B].
        """
        ...
