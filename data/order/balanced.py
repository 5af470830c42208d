"""Class-balanced order: every global batch holds P identities with K images each."""

import hashlib
import os
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from ..records.all_labels import WORTH_CACHING, cache_place
from ..records.cache import cached_arrays
from ..records.dataset import RecordDataset
from ..records.joint import JointDataset
from .orders import Integers, Order, counter_hash, permuted

_IDENTITY_STREAM, _IMAGE_STREAM = 32, 33
_VERSION = 2  # of the cache's content; in its name, as the index's


class Groups(NamedTuple):
    """Samples by identity: those of the i-th identity that has any are ``samples[starts[i] : starts[i] + counts[i]]``.

    ``samples``: int32 (int64 where there are more than 2³¹) [N]; ``starts``, ``counts``: int64 [identities].
    """

    samples: np.ndarray
    starts: Integers
    counts: Integers


def group_by_identity(labels: np.ndarray) -> Groups:
    """The groups of samples with these labels, integers [N]; −1 for samples that are not to be used."""
    samples = np.argsort(labels, kind="stable")
    present, counts = np.unique(labels, return_counts=True)
    starts = np.cumsum(counts) - counts
    if len(samples) <= np.iinfo(np.int32).max:
        samples = samples.astype(np.int32)
    return Groups(samples, starts[present >= 0], counts[present >= 0])


def groups_of(dataset: RecordDataset | JointDataset) -> Groups:
    """The groups of a data set, damaged samples left out.

    Of a large one they are sorted once and mapped from then on, so that the ranks of a machine share one copy.
    """
    if len(dataset) < WORTH_CACHING:
        return group_by_identity(dataset.labels(damaged=-1))
    sets = dataset.sets if isinstance(dataset, JointDataset) else [dataset]
    origins = [part.shard_labels.origin() for part in sets]
    about = {"sets": [about for about, _ in origins]}
    name = f"identities.{_VERSION}"
    if len(sets) > 1:  # with the first set, for each list of sets that it begins
        listed = os.fsencode("\0".join(str(part.path.resolve()) for part in sets))
        name += f"-{hashlib.sha256(listed).hexdigest()[:12]}"
    files = [path for _, paths in origins for path in paths]
    place = cache_place(sets[0].path, name)
    return Groups(*cached_arrays(place, about, files, lambda: [*group_by_identity(dataset.labels(damaged=-1))]))


class BalancedOrder(Order):
    """Batches of P·K positions: P different identities, K images of each, next to each other.

    The identities are cycled, in a new random order in each round; those that do not fill a batch at the end of a
    round (fewer than P, others in every round) wait for the next one. Of an identity's images the next K are taken at
    each of its turns, in an order that is drawn again when fewer than K are left; so K images of a turn are different
    ones, except where an identity has fewer than K: it gives each of its images again until there are K. (A
    round in which an identity waits passes over K of its images.)

    An identity with few images is seen as often as one with many, so there is no exact cover: ``epoch`` counts N
    positions as one epoch. Needs 4 bytes a sample and 16 an identity, which the ranks of a machine share.

    Args:
        groups: the samples of every identity.
        seed: another seed, another order.
        identities: P; at most as many as have an image.
        images: K.

    Raises:
        UsageError: there are fewer than P identities with images.
    """

    def __init__(self, groups: Groups, seed: int, *, identities: int, images: int) -> None:
        super().__init__(len(groups.samples), seed)
        self.identities, self.images = identities, images
        self._samples, self._starts, self._counts = groups
        if len(self._starts) < identities:
            raise UsageError(
                f"data.order: {identities} identities a batch, but only {len(self._starts)} have images: ask for fewer"
            )

    def at(self, positions: Integers) -> Integers:
        positions = np.asarray(positions, dtype=np.int64)
        batches, places = np.divmod(positions, self.identities * self.images)
        slots, images = np.divmod(places, self.images)
        present = len(self._starts)
        rounds, turns = np.divmod(batches, present // self.identities)
        keys = counter_hash(self.seed, _IDENTITY_STREAM, rounds)
        chosen = permuted(turns * self.identities + slots, present, keys)
        counts = self._counts[chosen]
        cycles, turns = np.divmod(rounds, np.maximum(counts // self.images, 1))
        keys = counter_hash(self.seed, _IMAGE_STREAM, chosen, cycles)
        places = self._starts[chosen] + permuted((turns * self.images + images) % counts, counts, keys)
        return self._samples[places].astype(np.int64)

    def visits(self, positions: Integers) -> Integers:
        return np.asarray(positions, dtype=np.int64)  # a sample may come several times in an epoch

    def batch_start(self, position: int, batch_size: int, *, drop: bool) -> int:
        return -(-position // batch_size) * batch_size  # off only where a run goes on with another P·K

    def batches(self, position: int, end: int, batch_size: int, *, drop: bool) -> int:
        return super().batches(self.batch_start(position, batch_size, drop=drop), end, batch_size, drop=False)

    def substitute(self, position: int, attempt: int) -> int:
        """First the identity's other images in this batch, so that the batch keeps its identities; then as always."""
        if attempt < self.images:
            first = position // self.images * self.images
            return first + (position - first + attempt) % self.images
        return super().substitute(position, attempt)
