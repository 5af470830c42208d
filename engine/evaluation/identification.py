"""Figures of a search of one probe in a gallery, 1:N (NIST FRVT 1:N; Grother et al., "NISTIR 8271", section 4)."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from .metrics import TIE, cuts
from .search import Floats, Ints

FPIR_LEVELS = (1e-1, 1e-2, 1e-3)
RANKS = (1, 5, 10, 20)

Weights = NDArray[np.float64]


def rank_k(k: int, mate: Floats, above: Ints, weights: Weights | None = None) -> float:
    """Closed set: the share of mated probes that have a mate among the first k.

    Args:
        mate: each probe's largest cosine with a mate, float32 [Q]; −inf where the gallery has none.
        above: how many of the others reach it, int64 [Q].
        weights: how often each probe counts, [Q]; once by default.
    """
    mated = np.isfinite(mate)
    return _share(above[mated] < k, None if weights is None else weights[mated])


def tpir_at_fpir(
    levels: Iterable[float], mate: Floats, other: Floats, weights: Weights | None = None
) -> dict[float, float]:
    """Open set: {level: TPIR at the smallest threshold T with FPIR(T) ≤ level}.

    FPIR(T): the share of non-mated probes whose best candidate's cosine is above T. TPIR(T): the share of mated probes
    whose best candidate is a mate, and above T. A level that is less than one non-mated probe is left out.

    Args:
        levels: the most FPIR.
        mate: each probe's largest cosine with a mate, float32 [Q]; −inf where the gallery has none.
        other: its largest with another identity, float32 [Q]; −inf where the gallery has none.
        weights: as of ``rank_k``.
    """
    mated = np.isfinite(mate)
    weights = np.ones(len(mate)) if weights is None else weights
    right, best = mate[mated] > other[mated] + TIE, mate[mated]
    thresholds = cuts(other[~mated], weights[~mated], levels)
    return {level: _share(right & (best > cut), weights[mated]) for level, cut in thresholds.items()}


def _share(hit: NDArray[np.bool_], weights: Weights | None) -> float:
    if weights is None:
        return float(hit.mean()) if len(hit) else float("nan")
    total = weights.sum()
    return float(hit @ weights / total) if total else float("nan")
