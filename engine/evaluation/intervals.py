"""How far a figure could be off: the bootstrap over identities (Efron & Tibshirani 1993, chapter 13).

Images of one identity are alike, so identities are drawn, not images or pairs, which would make intervals too narrow.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from .search import Ints

SAMPLES = 200
LEVEL = 0.95

Weights = NDArray[np.float64]


def over_identities(
    ids: Sequence[Ints],
    statistics: Callable[[Weights], dict[str, float]],
    *,
    samples: int = SAMPLES,
    moved: Callable[[], object] = lambda: None,
) -> dict[str, tuple[float, float]]:
    """The percentile interval of each statistic, of 95 %. The ranks share the draws, and each gets the same.

    Args:
        ids: the identities of each item, int64 [n] each: one of a probe, two of a pair; below 0 where unknown, which is
            an identity of its own.
        statistics: of weights [n], how often each item counts: an identity's number of draws; of a pair of two
            identities the product of theirs.
        samples: how often identities are drawn.
        moved: called at every draw.
    """
    number, unknown = len(ids[0]), max(int(one.max(initial=-1)) for one in ids) + 1
    codes = [np.where(one < 0, unknown + place * number + np.arange(number), one) for place, one in enumerate(ids)]
    known, joined = np.unique(np.concatenate(codes), return_inverse=True)
    first, *others = np.split(joined, len(ids))

    def once(draw: int) -> dict[str, float]:
        moved()
        generator = np.random.default_rng(draw)
        drawn = np.bincount(generator.integers(len(known), size=len(known)), minlength=len(known)).astype(np.float64)
        weights = drawn[first]
        for place in others:
            weights = np.where(place == first, weights, weights * drawn[place])
        return statistics(weights)

    found: dict[str, list[float]] = {}
    for one in _on_all_ranks(samples, once):
        for name, value in one.items():
            if np.isfinite(value):
                found.setdefault(name, []).append(value)
    tail = 50 * (1 - LEVEL)
    return {
        name: (float(np.percentile(values, tail)), float(np.percentile(values, 100 - tail)))
        for name, values in found.items()
    }


def _on_all_ranks(samples: int, once: Callable[[int], dict[str, float]]) -> list[dict[str, float]]:
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    mine = [once(draw) for draw in range(rank, samples, world_size)]
    if world_size == 1:
        return mine
    parts: list[list[dict[str, float]]] = [[]] * world_size
    dist.all_gather_object(parts, mine)
    return [one for part in parts for one in part]
