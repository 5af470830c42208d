"""The identities and the images that two sets share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ...data.errors import UsageError
from ..evaluation.search import CPU, nearest, unit
from .embedded import Embedded


@dataclass(frozen=True)
class Shared:
    """A training identity beside an identity of the test set; codes and rows are those of ``Embedded``."""

    train: int
    test: int
    cosine: float
    """Of their means."""
    train_row: int
    test_row: int
    """Of the two images that are most alike."""
    same_name: bool


@dataclass(frozen=True)
class Duplicate:
    """A training image beside one of the test set, by rows of ``Embedded``."""

    train_row: int
    test_row: int
    cosine: float
    same_bytes: bool


def between(embedded: Embedded, quantile: float, *, device: torch.device = CPU) -> float:
    """A cosine of two means that only a share 1 − ``quantile`` of a set's identities reaches with any other of its.

    Raises:
        UsageError: there are fewer than two identities.
    """
    if len(embedded.labels) < 2:
        raise UsageError("the set has one identity, which says nothing of how alike two are: choose the threshold")
    means = unit(embedded.sums())
    cosines, _ = nearest(means, means, 1, own=np.arange(len(means)), device=device)
    return float(np.quantile(cosines, quantile))


def shared_identities(
    train: Embedded,
    test: Embedded,
    same_names: list[tuple[int, int]],
    *,
    device: torch.device = CPU,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Shared]:
    """Every training identity with the nearest of the test set, and those of one name; the most alike first.

    Args:
        same_names: labels, in the training and in the test set, of the same name; those without an image do not count.
        device: where to search.
        progress: called with (done, total) for every pair.
    """
    of_train, of_test = unit(train.sums()), unit(test.sums())
    _, rows = nearest(of_train, of_test, 1, device=device)
    codes, other_codes = ({int(label): code for code, label in enumerate(one.labels)} for one in (train, test))
    named = {(codes[a], other_codes[b]) for a, b in same_names if a in codes and b in other_codes}
    pairs = named | set(enumerate(rows[:, 0].tolist()))
    found = []
    for one, other in pairs:
        ours, theirs = train.members[one], test.members[other]
        cosines = train.rows[torch.from_numpy(ours)] @ test.rows[torch.from_numpy(theirs)].T
        best, column = divmod(int(cosines.argmax()), len(theirs))
        cosine = float(of_train[one] @ of_test[other])
        found.append(Shared(one, other, cosine, int(ours[best]), int(theirs[column]), (one, other) in named))
        progress(len(found), len(pairs))
    return sorted(found, key=lambda pair: (-pair.cosine, pair.train, pair.test))


def duplicates(train: Embedded, test: Embedded, cosine: float, *, device: torch.device = CPU) -> list[Duplicate]:
    """Every training image that is an image of the test set, or nearly: of the same bytes, or with a cosine of at least
    ``cosine`` with its nearest one. The most alike first."""
    values, rows = nearest(train.rows, test.rows, 1, device=device)
    by_hash, places = np.unique(test.hashes, return_index=True)
    at = np.searchsorted(by_hash, train.hashes).clip(max=len(by_hash) - 1)
    same = by_hash[at] == train.hashes
    other = np.where(same, places[at], rows[:, 0])
    value = np.where(same, 1, values[:, 0])
    found = np.flatnonzero(same | (value >= cosine))
    found = found[np.argsort(-value[found], kind="stable")]
    return [Duplicate(int(row), int(other[row]), float(value[row]), bool(same[row])) for row in found]
