"""The embeddings of a data set by a trained network, kept in a file, and its identities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...data.errors import UsageError
from ..evaluation.search import Floats, Ints, unit

_BLOCK = 1 << 16  # images at a time


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
        for block in blocks(len(self.rows)):
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


def blocks(number: int) -> Iterator[slice]:
    """Of so many images, some at a time."""
    return (slice(start, min(start + _BLOCK, number)) for start in range(0, number, _BLOCK))
