"""What a run's centers are to its training images: which of an identity's centers its images chose, and which images
are far from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from ..data.errors import UsageError
from . import checkpoint

_CENTERS = "head/centers"
_BLOCK = 1 << 16  # identities at a time


@dataclass(frozen=True)
class Review:
    """What ``review`` found.

    Attributes:
        counts: images nearest to each of an identity's centers, int64 [C, S].
        dominant: the center with most of them, int64 [C].
        angles: of each image to its identity's dominant center, degrees, float32 [N]; NaN where it was not looked at.
    """

    counts: NDArray[np.int64]
    dominant: NDArray[np.int64]
    angles: NDArray[np.float32]

    def far(self, degrees: float) -> NDArray[np.int64]:
        """The images with a larger angle: with sub-centers, likely of another person."""
        return np.flatnonzero(self.angles > degrees)

    def summary(self, degrees: float) -> dict[str, int | float]:
        """As it stands in review.json; an identity without images counts in ``identities`` alone."""
        images = self.counts.sum(axis=1)
        seen = images > 0
        most = self.counts.max(axis=1)
        edges = range(0, 181, 15)
        known = self.angles[~np.isnan(self.angles)]
        histogram, _ = np.histogram(known, bins=np.array(edges, dtype=np.float64))
        return {
            "identities": len(self.counts),
            "identities_with_images": int(seen.sum()),
            "sub_centers": self.counts.shape[1],
            "images": int(images.sum()),
            "unreadable_images": int(np.isnan(self.angles).sum()),
            "images_at_the_dominant": int(most.sum()),
            "empty_sub_centers": int((self.counts[seen] == 0).sum()),
            "identities_in_several": int((most[seen] < 0.9 * images[seen]).sum()),
            "angle_median": float(np.median(known)) if len(known) else 0.0,
            "angle": degrees,
            "images_beyond_angle": len(self.far(degrees)),
            **{f"images_from_{low}_degrees": int(n) for low, n in zip(edges, histogram, strict=False)},
        }


def stored_centers(found: checkpoint.Found, folder: Path) -> NDArray[np.float32]:
    """All centers of a checkpoint, float32 [C, S, D], in a file of a folder: they need not fit the memory.

    Raises:
        UsageError: the checkpoint has none, or is damaged.
    """
    entry = found.shapes().get(_CENTERS)
    if entry is None:
        raise UsageError(f"{found.path} holds a backbone without centers")
    size = entry.size
    shape = (size[0], size[1] if len(size) == 3 else 1, size[-1])
    centers = np.lib.format.open_memmap(folder / "all.npy", mode="w+", dtype=np.float32, shape=shape)
    for first, rows in checkpoint.read_pieces(found, _CENTERS):
        centers[first : first + len(rows)] = rows.float().view(-1, *shape[1:]).numpy()
    return centers


def review(
    centers: NDArray[np.float32],
    batches: Iterator[tuple[NDArray[np.int64], NDArray[np.int64], torch.Tensor]],
    images: int,
) -> Review:
    """Every image with the centers of its identity.

    Args:
        centers: [C, S, D].
        batches: numbers and labels, int64 [n] each, and embeddings float32 [n, D] of images, each once.
        images: N, over all numbers.
    """
    counts = np.zeros(centers.shape[:2], dtype=np.int64)
    cosines = np.full((images, centers.shape[1]), np.nan, dtype=np.float32)
    of_image = np.zeros(images, dtype=np.int64)
    for numbers, labels, embeddings in batches:
        own = normalize(torch.from_numpy(centers[labels]), dim=2)  # [n, S, D]
        found = (own @ normalize(embeddings)[:, :, None])[:, :, 0].numpy()
        np.add.at(counts, (labels, found.argmax(axis=1)), 1)
        cosines[numbers], of_image[numbers] = found, labels
    dominant = counts.argmax(axis=1)
    chosen = cosines[np.arange(images), dominant[of_image]]
    return Review(counts, dominant, np.degrees(np.arccos(chosen.clip(-1, 1))).astype(np.float32))


def write_dominant(
    centers: NDArray[np.float32], dominant: NDArray[np.int64], path: Path, progress: Callable[[int, int], object]
) -> None:
    """The dominant center of each identity into a .npy file, float32 [C, D], of length 1."""
    kept = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(centers), centers.shape[2]))
    for start in range(0, len(centers), _BLOCK):
        block = centers[start : start + _BLOCK]
        chosen = torch.from_numpy(block[np.arange(len(block)), dominant[start : start + _BLOCK]])
        kept[start : start + _BLOCK] = normalize(chosen).numpy()
        progress(min(start + _BLOCK, len(centers)), len(centers))
    kept.flush()
