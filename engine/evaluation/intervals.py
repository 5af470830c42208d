"""How far a figure could be off: the bootstrap over identities (Efron & Tibshirani 1993, chapter 13).

Images of one identity are alike, so identities are drawn, not images or pairs, which would make intervals too narrow.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .search import Ints

SAMPLES = 200
LEVEL = 0.95

Weights = NDArray[np.float64]


def over_identities(
    ids: Sequence[Ints], statistics: Callable[[Weights], dict[str, float]], *, samples: int = SAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The percentile interval of each statistic, of 95 %.

    Args:
        ids: the identities of each item, int64 [n] each: one of a probe, two of a pair; below 0 where unknown, which is
            an identity of its own.
        statistics: of weights [n], how often each item counts: an identity's number of draws, or the product of two.
        samples: how often identities are drawn.
        seed: of the draws.
    """
    codes = [np.where(one < 0, one.max(initial=0) + 1 + np.arange(len(one)), one) for one in ids]
    known, joined = np.unique(np.concatenate(codes), return_inverse=True)
    places = np.split(joined, np.cumsum([len(one) for one in codes])[:-1])
    generator = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for _ in range(samples):
        drawn = np.bincount(generator.integers(len(known), size=len(known)), minlength=len(known)).astype(np.float64)
        weights = np.prod([drawn[place] for place in places], axis=0)
        for name, value in statistics(weights).items():
            found.setdefault(name, []).append(value)
    tail = 50 * (1 - LEVEL)
    return {
        name: (float(np.percentile(good, tail)), float(np.percentile(good, 100 - tail)))
        for name, values in found.items()
        if len(good := [value for value in values if np.isfinite(value)])
    }
