"""The centers that a step uses, read a block at a time where they are stored, and rows scaled to length 1."""

from bisect import bisect_left
from functools import cached_property

import torch
from torch import Tensor

from ..device import block_bytes
from . import native

_SHORTEST = 1e-10  # times the largest p = e^64 its inverse still fits float32


def inverse_norms(rows: Tensor) -> Tensor:
    """1/‖row‖ of rows [N, D], [N, 1]; 0 for a row shorter than 10⁻¹⁰, which counts as zero."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(norms > _SHORTEST, norms.reciprocal(), 0.0)


def normalize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, D] scaled to length 1, and their inverse norms [N, 1]; a row of zeros stays so, with inverse norm 0."""
    inverse = inverse_norms(rows)
    return rows * inverse, inverse


def normalize_backward(gradient: Tensor, normalized: Tensor, inverse: Tensor) -> Tensor:
    """The gradient by the rows themselves, from the one by the normalised rows: (g − (g·n) n)/‖row‖.

    In float64, and with n's own length, 1 to a few roundings only: the part of g along n, which is to vanish, may be a
    hundred times longer than what stays (P2SGrad's is).
    """
    wide, unit = gradient.double(), normalized.double()
    along = (wide * unit).sum(dim=1, keepdim=True) / unit.square().sum(dim=1, keepdim=True).clamp_min(0.5)
    return ((wide - along * unit) * inverse).to(gradient.dtype)


def stored_rows(matrix: Tensor, index: Tensor | None, start: int, stop: int) -> Tensor:
    """Rows [n, ...] of the places [start, stop) of a step: a view where it uses all rows (no index), else a copy."""
    return matrix[start:stop] if index is None else matrix.index_select(0, index[start:stop])


def computed_dtype(stored: torch.dtype) -> torch.dtype:
    """What rows are computed in: as they are stored, or float32 where that is bfloat16."""
    return torch.float32 if stored == torch.bfloat16 else stored


def block_rows(weight: Tensor, device: torch.device | None = None, sub_centers: int = 1) -> int:
    """How many rows of a matrix [N, D] make a block, on the device that computes them: where they are when None.

    Args:
        sub_centers: rows of a class, which are never in two blocks.
    """
    rows = max(64, block_bytes(device or weight.device) // (weight.shape[1] * computed_dtype(weight.dtype).itemsize))
    return max(1, rows // sub_centers) * sub_centers


class SampledRows:
    """K rows of the shard's matrix, or of a step's copy of them.

    Args:
        weight: centers [rows, D]; in bfloat16, they are widened as they are read.
        index: places of the K in it, int64 [K], each once, those of ascending classes; None for all rows.
        device: where they are wanted; where they are stored when None.

    Attributes:
        dtype: of what is returned.
        inverse: inverse norms [K, 1], filled by ``measure``; 0 for a row of zeros.
    """

    def __init__(self, weight: Tensor, index: Tensor | None, device: torch.device | None = None) -> None:
        self.weight = weight
        self.index = index
        self.device = device or weight.device
        self.dtype = computed_dtype(weight.dtype)
        self.inverse = torch.empty(len(self), 1, dtype=self.dtype, device=self.device)

    def __len__(self) -> int:
        return len(self.weight) if self.index is None else len(self.index)

    def measure(self, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """``stored_rows`` of the places [start, stop), [n, D]; their inverse norms are known from here on.

        Args:
            buffer: [≥ n, D] of ``dtype``, where a copy may be put.
        """
        if native.supports(self.weight) and self.device == self.weight.device:  # the rows and their norms in one pass
            copy = None
            if self.copies:
                size = stop - start, self.weight.shape[1]
                copy = torch.empty(size, dtype=self.dtype) if buffer is None else buffer[: stop - start]
            native.measure_rows(self.weight, self.index, start, stop, copy, self.inverse)
            return self.weight[start:stop] if copy is None else copy
        rows = self.stored(start, stop)
        self.inverse[start:stop] = inverse_norms(rows)
        return rows

    @property
    def copies(self) -> bool:
        """Whether ``measure`` copies, so that a buffer serves it."""
        return self.index is not None or self.dtype != self.weight.dtype or not self.weight.is_contiguous()

    def stored(self, start: int, stop: int) -> Tensor:
        """``stored_rows`` of the places [start, stop), [n, D] of ``dtype``."""
        return stored_rows(self.weight, self.index, start, stop).to(self.device, self.dtype)

    def normalized(self, start: int, stop: int) -> Tensor:
        """The same, scaled to length 1."""
        return self.measure(start, stop) * self.inverse[start:stop]

    def at(self, places: Tensor) -> Tensor:
        """The stored rows of any places, [n, D]."""
        places = places if self.index is None else self.index[places]
        return self.weight[places.to(self.weight.device)].to(self.device, self.dtype)


class OwnClasses:
    """Where the batch's own classes stand among the K rows of this rank.

    Args:
        columns: place of each sample's own class, int64 [B]; −1 where another rank has it. Two samples may have the
            same.
    """

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns

    @cached_property
    def samples(self) -> Tensor:
        """The samples whose class is here, int64 [M], in the order of ``places``."""
        return self._ascending[1][self._elsewhere :]

    @cached_property
    def places(self) -> Tensor:
        """Places of their classes, int64 [M], ascending."""
        return self._ascending[0][self._elsewhere :]

    def within(self, start: int, stop: int) -> slice | None:
        """Which of the M stand in the block [start, stop); None where none does."""
        first, last = (bisect_left(self._listed, place) - self._elsewhere for place in (start, stop))
        return slice(first, last) if last > first else None

    def add(self, gradient: Tensor, start: int, stop: int, values: Tensor) -> None:
        """Adds those of ``values`` [M, D] that stand in the block [start, stop) to its ``gradient`` [n, D]."""
        inside = self.within(start, stop)
        if inside is not None:
            gradient.index_add_(0, self.places[inside] - start, values[inside])

    @cached_property
    def _ascending(self) -> tuple[Tensor, Tensor]:
        """All B columns ascending, −1 first, and whose they are."""
        places, samples = self.columns.sort(stable=True)
        return places, samples

    @cached_property
    def _listed(self) -> list[int]:
        """On a GPU the plain kernels' only host synchronisation of a step, apart from the number of classes sampled."""
        return self._ascending[0].tolist()

    @cached_property
    def _elsewhere(self) -> int:
        """How many samples' classes are not here."""
        return bisect_left(self._listed, 0)


def nearest_of_own(classes: OwnClasses, rows: SampledRows, unit: Tensor, sub_centers: int) -> OwnClasses:
    """Where each sample's own class stands, counted in rows: of several rows the nearest one.

    Args:
        classes: the same counted in classes.
        rows: the centers, those of a class next to each other.
        unit: normalised embeddings [B, D].
    """
    if sub_centers == 1:
        return classes
    places = classes.places[:, None] * sub_centers + torch.arange(sub_centers, device=unit.device)  # [M, S]
    candidates = normalize(rows.at(places.flatten()))[0].view(*places.shape, unit.shape[1])
    nearest = (candidates * unit[classes.samples, None]).sum(dim=2).argmax(dim=1, keepdim=True)
    columns = torch.full_like(classes.columns, -1)
    columns[classes.samples] = places.gather(1, nearest)[:, 0]
    return OwnClasses(columns)
