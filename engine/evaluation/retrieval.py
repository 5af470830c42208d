"""Figures of retrieval: each a function of the places at which a query finds its mates, counted from 1.

Arguments of all: ``places`` int64 [M], rising within a query, and ``starts`` int64 [Q + 1], query i's are
``places[starts[i] : starts[i + 1]]``, at least one each. All give float64 [Q], a value a query: their mean is the
figure, their resampling its interval.
"""

import numpy as np
from numpy.typing import NDArray

from .search import Ints, Mates, Others

Values = NDArray[np.float64]


def places_of(mates: Mates, others: Others) -> Ints:
    """Where each mate stands among all of the gallery, from 1 on, int64 [M]; after all others of the same cosine."""
    number = np.arange(len(mates.row)) - np.repeat(mates.starts[:-1], mates.counts)
    return others.above + number + 1


def found_within(k: int, places: Ints, starts: Ints) -> Values:
    """Whether the first mate is among the first k: Recall@K (Jégou et al. 2011, "Product quantization"), and the
    cumulative match characteristic at rank k (Phillips et al. 2000, "FERET")."""
    return (places[starts[:-1]] <= k).astype(np.float64)


def average_precision(places: Ints, starts: Ints) -> Values:
    """(1/M) Σ_j j/p_j over all M mates, p_j the place of the j-th; its mean is mAP (Zheng et al. 2015, "Scalable person
    re-identification")."""
    return _sums(_precision(places, starts), starts) / np.diff(starts)


def average_precision_at_r(places: Ints, starts: Ints) -> Values:
    """(1/R) Σ over the mates within the first R of j/p_j, R the number of mates: its mean is MAP@R (Musgrave et al.
    2020, "A metric learning reality check", equation 2)."""
    numbers = np.diff(starts)
    within = places <= np.repeat(numbers, numbers)
    return _sums(_precision(places, starts) * within, starts) / numbers


def r_precision(places: Ints, starts: Ints) -> Values:
    """The share of mates among the first R, R their number (Musgrave et al. 2020)."""
    numbers = np.diff(starts)
    return _sums((places <= np.repeat(numbers, numbers)).astype(np.float64), starts) / numbers


def inverse_negative_penalty(places: Ints, starts: Ints) -> Values:
    """M / p_M, the number of mates over the last one's place: its mean is mINP (Ye et al. 2021, "AGW", equation 5)."""
    return np.diff(starts) / places[starts[1:] - 1]


def _precision(places: Ints, starts: Ints) -> Values:
    """j/p_j, the share of mates up to each mate."""
    numbers = np.diff(starts)
    return (np.arange(len(places)) - np.repeat(starts[:-1], numbers) + 1) / places


def _sums(values: Values, starts: Ints) -> Values:
    return np.add.reduceat(values, starts[:-1]) if len(starts) > 1 else np.zeros(0)
