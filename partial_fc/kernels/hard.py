"""Hard negatives: those with a cosine above their sample's threshold, which count with another cosine.

One form serves all objectives that do this: g(z) = a·z² + b·z + c + d·√(1 − z²) where z > threshold, z elsewhere. a = 0
and b = 1 add a constant, b = cos m and d = sin m rotate by an angle (cos(θ − m)), c = −∞ leaves the negative out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .products import ComputeDtype, operand_dtype, products_in
from .rows import OwnClasses, SampledRows, block_rows, inverse_norms

_LARGEST_EXPONENT = 64.0  # p up to e^64 over a row's norm fits float32 (rows.py)


@dataclass(frozen=True)
class HardNegatives:
    """Which negatives are hard, and what their cosine becomes.

    Attributes:
        threshold: of each sample, float64 [B].
        numbers: a, b, c, d, and the largest value of g on [−1, 1] or more; float64 [5], on the batch's device, so that
            numbers that training changes need no host.
    """

    threshold: Tensor
    numbers: Tensor

    @classmethod
    def of(
        cls,
        threshold: Tensor,
        *,
        square: float | Tensor = 0.0,
        slope: float | Tensor = 0.0,
        constant: float | Tensor = 0.0,
        sine: float | Tensor = 0.0,
    ) -> "HardNegatives":
        """From a, b, c and d: numbers, or tensors [] on the batch's device."""
        threshold = threshold.double()
        parts = (square, slope, constant, sine)
        a, b, c, d = (one if isinstance(one, Tensor) else threshold.new_full((), one) for one in parts)
        largest = torch.maximum(a.abs() + (b.square() + d.square()).sqrt() + c, torch.ones_like(a))
        return cls(threshold, torch.stack([a, b, c, d, largest]))

    def part(self, batch: Tensor | slice) -> "HardNegatives":
        """Those of some of the samples."""
        return HardNegatives(self.threshold[batch], self.numbers)

    def shift(self, scale: float) -> Tensor:
        """What must be subtracted from scale·g(z) so that its exponential fits float32, float64 []; mostly 0.

        Where it is not, the exponential of a negative that is far below vanishes: at scale 64 and g(1) = 1.5 (the
        curriculum's t = 0.5) that of a cosine below −0.86.
        """
        return (scale * self.numbers[4] - _LARGEST_EXPONENT).clamp_min(0.0)

    def transform(self, cosines: Tensor) -> tuple[Tensor, Tensor]:
        """g(z) and g′(z) of cosines [..., B], in their dtype."""
        a, b, c, d, _ = self.numbers.to(cosines.dtype)
        hard = cosines > self.threshold.to(cosines.dtype)
        sine = (1 - cosines.square()).clamp_min(1e-8).sqrt()
        changed = (a * cosines + b) * cosines + c + d * sine
        slope = 2 * a * cosines + b - d * cosines / sine
        return torch.where(hard, changed, cosines), torch.where(hard, slope, 1.0)


def largest_cosines(
    unit: Tensor, rows: SampledRows, own: OwnClasses, count: int, compute_dtype: ComputeDtype, sub_centers: int
) -> Tensor:
    """The largest cosines among each sample's negatives on this rank, descending, [B, count]; −∞ where there are fewer.

    One product more than the reduction itself, 2·B·K·D, by blocks; the host waits for nothing.

    Args:
        unit: normalised embeddings [B, D].
        rows: the centers; with an index of −1 for none.
        own: the samples' own classes, counted in classes.
    """
    found = unit.new_full((count, len(unit)), -torch.inf)
    dtype, size = operand_dtype(compute_dtype, unit.device), block_rows(unit, sub_centers=sub_centers)
    columns = unit.to(dtype).T.contiguous()
    index = rows.index
    readable = rows if index is None else SampledRows(rows.weight, index.clamp_min(0), rows.device)
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        block = readable.stored(start, stop)
        rounded = (block * inverse_norms(block)).to(dtype)  # normalised before, as the reduction has it
        with products_in(compute_dtype, unit.device):
            cosines = (rounded @ columns).to(unit.dtype)  # [n, B]
        if index is not None:
            cosines.masked_fill_(index[start:stop, None] < 0, -torch.inf)
        classes = cosines.view(-1, sub_centers, len(unit)).amax(dim=1)
        place = own.columns - start // sub_centers
        here = (own.columns >= 0) & (place >= 0) & (place < len(classes))
        place = torch.where(here, place, 0)[None]
        classes.scatter_(0, place, torch.where(here[None], -torch.inf, classes.gather(0, place)))
        found = torch.cat([found, classes]).topk(count, dim=0).values
    return found.T.contiguous()
