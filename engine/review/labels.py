"""Labels that look wrong: images of another identity, two labels of one identity, one label of two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...data.errors import UsageError
from ..evaluation.search import CPU, Floats, Ints, nearest, unit
from .embedded import Embedded, blocks, halves

FEWEST = 3
"""Images that an identity needs before one of them can be far from the others, and that a half of it needs."""
_WORTH = 5  # correct images that may be lost with one wrong one, where the threshold of outliers stands
_ROUNDS = 10  # of two-means


@dataclass(frozen=True)
class Outliers:
    """Images that are likely of another identity.

    Attributes:
        rows: of ``Embedded``, int64 [K], those that are least like their identity first.
        own: cosine with the mean of the identity's other images, float32 [N]; NaN where there are fewer than two.
        other: an outlier's cosine with the nearest mean of another identity, float32 [K], and the code of that one,
            int64 [K].
        threshold: what ``own`` of an outlier is below; −1, which nothing is below, where none are likely.
        share: of all images, how many are of another identity, estimated.
        limit: what 95 % of the images' cosines with the mean of a random other identity are below.
    """

    rows: Ints
    own: Floats
    other: Floats
    code: Ints
    threshold: float
    share: float
    limit: float


def outliers(embedded: Embedded, threshold: float | None = None, *, device: torch.device = CPU) -> Outliers:
    """The images that are likely of another identity: less like the mean of their identity's others than a threshold.

    Args:
        threshold: a cosine; by default ``outlier_threshold``. Identities of less than FEWEST images have no outliers.
        device: where to search for the nearest other identity, of the outliers alone.

    Raises:
        UsageError: there are fewer than two identities.
    """
    identities = len(embedded.labels)
    if identities < 2:
        raise UsageError("the set has one identity, and nothing to compare its images with")
    sums, codes = embedded.sums(), torch.from_numpy(embedded.codes)
    means = unit(sums)
    strangers = (codes + torch.from_numpy(np.random.default_rng(0).integers(1, identities, len(codes)))) % identities
    own, strange = torch.empty(len(codes)), torch.empty(len(codes))
    for block in blocks(len(codes)):
        rows = embedded.rows[block]
        own[block] = (rows * unit(sums[codes[block]] - rows)).sum(dim=1)
        strange[block] = (rows * means[strangers[block]]).sum(dim=1)
    counts = embedded.counts[embedded.codes]
    mine = np.where(counts > 1, own.numpy(), np.nan)
    computed, share = outlier_threshold(mine[counts >= FEWEST], strange.numpy())
    chosen = computed if threshold is None else threshold
    found = np.flatnonzero((counts >= FEWEST) & (mine < chosen))
    found = found[np.argsort(mine[found], kind="stable")]
    values, nearer = nearest(embedded.rows[torch.from_numpy(found)], means, 1, own=embedded.codes[found], device=device)
    limit = float(np.quantile(strange.numpy(), 0.95))
    return Outliers(found, mine, values[:, 0], nearer[:, 0], chosen, share, limit)


def outlier_threshold(own: Floats, strangers: Floats) -> tuple[float, float]:
    """Below which cosine with its identity an image is likely another one's, and the estimated share of such images.

    The images under a label are a mixture of its own and of wrong ones. How like an identity wrong images are is
    known: as images are like a random other identity, a part S(t) of which has at most cosine t. Their share follows
    from the median of S, below which hardly any image is its identity's own: p = 2·F(median), with F of ``own``. Of the
    images up to t, p·S(t) are then wrong, and F(t) − p·S(t) are not. The threshold is the t with the largest

        p·S(t) − (F(t) − p·S(t)) / _WORTH

    so it stands where one more wrong image would cost _WORTH correct ones. Where no images are wrong, it is −1.

    Args:
        own: cosines of images with the mean of their identity's others, [N].
        strangers: cosines of images with the mean of another identity drawn at random, [M].
    """
    if not len(own):
        return -1.0, 0.0
    known, random = np.sort(own), np.sort(strangers)
    share = min(1.0, 2 * float((known <= np.median(random)).mean()))
    upto = np.arange(1, len(known) + 1) / len(known)
    wrong = share * np.searchsorted(random, known, "right") / len(random)
    gain = wrong - (upto - wrong) / _WORTH
    best = int(gain.argmax())
    return (float(np.nextafter(known[best], np.float32(2))) if gain[best] > 0 else -1.0), share


def merged_threshold(embedded: Embedded) -> float:
    """The cosine from which two labels' means are as near as the halves of one identity: the median of ``halves``.

    Raises:
        UsageError: no identity has two images.
    """
    own = halves(embedded)
    if not len(own):
        raise UsageError("no identity has two images, so nothing says how alike one is to itself: give --alike")
    return float(np.median(own))


def merged(
    embedded: Embedded, threshold: float, *, device: torch.device = CPU, most: int = 8
) -> list[tuple[int, int, float]]:
    """Codes of two identities and the cosine of their means, where it is ``threshold`` or more; the most alike first.

    Of every identity the ``most`` nearest others are looked at.
    """
    means = unit(embedded.sums())
    k = min(most, len(means) - 1)
    cosines, rows = nearest(means, means, k, own=np.arange(len(means)), device=device)
    near, place = np.nonzero(cosines >= threshold)
    pairs = {(min(a, b), max(a, b)): c for a, b, c in zip(near, rows[near, place], cosines[near, place], strict=True)}
    return sorted(((int(a), int(b), float(c)) for (a, b), c in pairs.items()), key=lambda pair: -pair[2])


@dataclass(frozen=True)
class Split:
    """An identity that falls into two: its code, the rows of the larger and of the smaller half, and the cosine of
    their means."""

    code: int
    larger: Ints
    smaller: Ints
    cosine: float


def splits(
    embedded: Embedded, limit: float, *, progress: Callable[[int, int], object] = lambda done, total: None
) -> list[Split]:
    """The identities whose images are two clusters, by two-means on the sphere; the furthest apart first.

    The means of two clusters are less alike than ``limit`` (that of ``outliers``). Each has FEWEST images or more, and
    half of these have an average cosine with the cluster's others that three quarters of all images have with the
    others of their identity. So some images that are like nothing are no cluster.
    """
    alike, sums, counts = torch.empty(len(embedded.codes)), embedded.sums(), torch.from_numpy(embedded.counts)
    for block in blocks(len(alike)):
        codes = torch.from_numpy(embedded.codes[block])
        alike[block] = _average(embedded.rows[block], sums[codes], counts[codes])
    least = float(np.nanquantile(alike.numpy(), 0.25)) if not alike.isnan().all() else 1.0
    found = []
    for code, members in enumerate(embedded.members):
        progress(code + 1, len(embedded.members))
        if len(members) < 2 * FEWEST:
            continue
        rows = embedded.rows[torch.from_numpy(members)]
        second = _two_means(rows).long()
        sizes = second.bincount(minlength=2)
        if sizes.min() < FEWEST:
            continue
        sums = torch.zeros(2, rows.shape[1]).index_add_(0, second, rows)
        cosine = float(unit(sums)[0] @ unit(sums)[1])
        within = _average(rows, sums[second], sizes[second])
        if cosine < limit and min(within[second == half].median() for half in (0, 1)) >= least:
            larger, smaller = (members[(second == half).numpy()] for half in sizes.argsort(descending=True))
            found.append(Split(code, larger, smaller, cosine))
    return sorted(found, key=lambda split: split.cosine)


def _average(rows: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """The average cosine of each image [n, D] with the others of its group, of which it is one: the groups' sums [n, D]
    and sizes [n]; NaN where there is no other."""
    others = counts - 1
    return torch.where(others > 0, ((rows * sums).sum(dim=1) - 1) / others, torch.nan)


def _two_means(rows: Tensor) -> Tensor:
    """Which of the rows [n, D] are of the second of two clusters, bool [n]; the same in every call."""
    one = rows[(rows @ rows.sum(dim=0)).argmin()]
    second = rows @ one > rows @ rows[(rows @ one).argmin()]
    for _ in range(_ROUNDS):
        means = unit(torch.stack([rows[~second].sum(dim=0), rows[second].sum(dim=0)]))
        before, second = second, rows @ means[1] > rows @ means[0]
        if torch.equal(before, second):
            break
    return second
