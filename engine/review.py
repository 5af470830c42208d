"""What a trained network says about data: identities and images that two sets share, and labels that look wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.errors import UsageError
from .evaluation.search import CPU, nearest, unit

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Progress = Callable[[int, int], object]

FEWEST = 3
"""Images that an identity needs before one of them can be far from the others, and that a half of it needs."""
_BLOCK = 1 << 16  # images at a time
_ROUNDS = 10  # of two-means
_WORTH = 5  # correct images that may be lost with one wrong one, where the threshold of outliers stands


class Batch(NamedTuple):
    """Some images of a set: numbers and labels, int64 [n] each, embeddings float32 [n, D], and the encoded images."""

    numbers: Ints
    labels: Ints
    embeddings: Tensor
    images: Sequence[bytes | NDArray[np.uint8]]


@dataclass(frozen=True)
class Embedded:
    """The N images of a set that could be read.

    Attributes:
        rows: embeddings of length 1, float32 [N, D], in a file.
        numbers: of each image in its set, rising, int64 [N].
        codes: which of ``labels`` each image has, int64 [N].
        labels: those that have an image, rising, int64 [C].
        hashes: of each image's bytes, uint64 [N].
        members: the rows of each of ``labels``, [C] arrays of int64.
    """

    rows: Tensor
    numbers: Ints
    codes: Ints
    labels: Ints
    hashes: NDArray[np.uint64]
    members: list[Ints]

    @property
    def counts(self) -> Ints:
        """Images of each label, int64 [C]."""
        return np.bincount(self.codes, minlength=len(self.labels))

    def sums(self, chosen: NDArray[np.bool_] | None = None) -> Tensor:
        """The sum of each label's embeddings, or of the ``chosen`` (bool [N]) among them, float32 [C, D]."""
        total = torch.zeros(len(self.labels), self.rows.shape[1])
        for block in _blocks(len(self.rows)):
            which = slice(None) if chosen is None else torch.from_numpy(chosen[block])
            total.index_add_(0, torch.from_numpy(self.codes[block])[which], self.rows[block][which])
        return total


def store(batches: Iterator[Batch], images: int, path: Path) -> Embedded:
    """Keeps the embeddings of a set in a new .npy file, so that they need not fit the memory.

    Args:
        batches: of rising numbers.
        images: how many there are at most.
        path: the file, float32 [images, D]; rows beyond the images that could be read are zero.

    Raises:
        UsageError: no image could be read, or an embedding is not finite.
    """
    rows: Floats | None = None
    numbers, labels, hashes, done = [], [], [], 0
    for batch in batches:
        if not torch.isfinite(batch.embeddings).all():
            raise UsageError("the run's embeddings are not finite: it has diverged, take an earlier checkpoint")
        if rows is None:
            shape = (images, batch.embeddings.shape[1])
            rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        rows[done : done + len(batch.numbers)] = unit(batch.embeddings).numpy()
        done += len(batch.numbers)
        numbers.append(batch.numbers)
        labels.append(batch.labels)
        digests = b"".join(blake2b(bytes(image), digest_size=8).digest() for image in batch.images)
        hashes.append(np.frombuffer(digests, dtype=np.uint64))
    if rows is None:
        raise UsageError("no image could be read: see what pfc inspect says of the data set")
    present, codes = np.unique(np.concatenate(labels), return_inverse=True)
    by_code = np.argsort(codes, kind="stable")
    members = np.split(by_code, np.cumsum(np.bincount(codes))[:-1])
    kept = torch.from_numpy(rows)[:done]
    return Embedded(kept, np.concatenate(numbers), codes, present, np.concatenate(hashes), members)


def typical(embedded: Embedded, code: int) -> int:
    """The row of the image that is most like the mean of its identity."""
    members = embedded.members[code]
    rows = embedded.rows[torch.from_numpy(members)]
    return int(members[int((rows @ rows.sum(dim=0)).argmax())])


def halves(embedded: Embedded) -> Floats:
    """How alike one identity is to itself: the cosine of the means of two random halves of its images, float32 [H].

    Of every identity with 4 images or more; where there is none, with 2 or more. The choice is always the same.
    """
    shuffled = np.random.default_rng(0).permutation(len(embedded.codes))
    order = shuffled[np.argsort(embedded.codes[shuffled], kind="stable")]
    counts = embedded.counts
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    second = np.zeros(len(order), dtype=bool)
    second[order] = 2 * place >= counts[embedded.codes[order]]
    cosines = (unit(embedded.sums(~second)) * unit(embedded.sums(second))).sum(dim=1).numpy()
    return cosines[counts >= (4 if counts.max() >= 4 else 2)]


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
    progress: Progress = lambda done, total: None,
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
    for block in _blocks(len(codes)):
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


def splits(embedded: Embedded, limit: float, *, progress: Progress = lambda done, total: None) -> list[Split]:
    """The identities whose images are two clusters, by two-means on the sphere; the furthest apart first.

    The means of two clusters are less alike than ``limit`` (that of ``outliers``). Each has FEWEST images or more, and
    half of these have an average cosine with the cluster's others that three quarters of all images have with the
    others of their identity. So some images that are like nothing are no cluster.
    """
    alike, sums, counts = torch.empty(len(embedded.codes)), embedded.sums(), torch.from_numpy(embedded.counts)
    for block in _blocks(len(alike)):
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


def _blocks(number: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, number)) for start in range(0, number, _BLOCK))
