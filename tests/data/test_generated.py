"""A generated data set: the same pictures in any batch and on any ranks, of the active identities alone."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch

from pfc.data import GeneratedDataset, GeneratedLoader, UsageError
from pfc.data.order.orders import BlockOrder, SampleOrder
from tests.data.pictures import as_tensor

SMALL = GeneratedDataset(1000, images_per_identity=5, image_size=(20, 28), active=8)


def collect(steps: int, batch_size: int, world_size: int = 1, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batches, put together from every rank: images [n, 3, H, W] and labels [n]."""
    loaders = [
        GeneratedLoader(SMALL, batch_size=batch_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    batches = [next(loader) for _ in range(steps) for loader in loaders]
    for loader in loaders:
        loader.close()
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def test_the_pictures_stay_the_same_ones() -> None:
    """A run resumes on them, maybe on another machine or version."""
    pixels = SMALL.pictures(np.arange(len(SMALL)))
    assert pixels.shape == (40, 20, 28, 3)
    assert hashlib.sha256(pixels).hexdigest()[:16] == "5d78886d085049db"
    assert (np.concatenate([SMALL.pictures(np.array([sample])) for sample in range(40)]) == pixels).all()


def test_an_identity_looks_like_itself_whatever_others_are_active() -> None:
    pixels = SMALL.pictures(np.arange(40)).astype(float).reshape(8, 5, -1)
    pixels -= pixels.mean(axis=2, keepdims=True)
    pixels /= np.linalg.norm(pixels, axis=2, keepdims=True)
    cosines = np.einsum("aip,bjp->abij", pixels, pixels).mean(axis=(2, 3))
    assert (cosines.argmax(axis=1) == np.arange(8)).all()
    assert len(np.unique(pixels, axis=1)) == 8, "each picture is another one"

    all_active = GeneratedDataset(1000, images_per_identity=5, image_size=(20, 28))
    assert len(all_active) == 5000
    assert (all_active.pictures(np.arange(625, 630)) == SMALL.pictures(np.arange(5, 10))).all()  # identity 125
    other = GeneratedDataset(1000, images_per_identity=5, image_size=(20, 28), active=8, seed=1)
    assert (other.pictures(np.arange(8)) != SMALL.pictures(np.arange(8))).mean() > 0.9


def test_an_epoch_shows_every_image_of_the_active_identities_once() -> None:
    images, labels = collect(steps=5, batch_size=8, flip=False, seed=4)
    samples = SampleOrder(40, seed=4).at(np.arange(40))
    assert torch.equal(images, torch.stack([as_tensor(picture) for picture in SMALL.pictures(samples)]))
    assert labels.tolist() == (samples // 5 * 125).tolist(), "evenly over the labels"
    large = GeneratedDataset(10_000_000, images_per_identity=100, image_size=(32, 32))
    assert large.labels(np.array([0, 99, 100, len(large) - 1])).tolist() == [0, 0, 1, 9_999_999]


def test_ranks_batches_and_restarts_change_nothing() -> None:
    options = {"seed": 3, "order": BlockOrder(40, 3, block_size=5, window=10)}
    images, labels = collect(steps=10, batch_size=12, **options)  # three epochs
    many, their_labels = collect(steps=10, batch_size=4, world_size=3, **options)
    assert torch.equal(many, images)
    assert torch.equal(their_labels, labels)
    loader = GeneratedLoader(SMALL, batch_size=12, **options)
    for _ in range(4):
        next(loader)
    assert loader.position == 48, "what was handed out, not what is computed ahead"
    assert loader.epoch == 1.2
    rest, _ = collect(steps=12, batch_size=3, world_size=2, position=loader.position, **options)
    loader.close()
    assert torch.equal(rest, images[48:])


def test_half_of_the_images_are_mirrored() -> None:
    flipped, plain = collect(steps=10, batch_size=20)[0], collect(steps=10, batch_size=20, flip=False)[0]
    mirrored = [torch.equal(one, other.flip(2)) for one, other in zip(flipped, plain, strict=True)]
    assert 60 < sum(mirrored) < 140
    same = [torch.equal(one, other) for one, other in zip(flipped, plain, strict=True)]
    assert sum(same) + sum(mirrored) == 200


def test_a_rest_that_is_dropped() -> None:
    with pytest.raises(UsageError, match=r"drop leaves nothing of the 40 images of an epoch at a global batch of 42"):
        GeneratedLoader(SMALL, batch_size=21, world_size=2, drop=True)
    loader = GeneratedLoader(SMALL, batch_size=12, drop=True)
    assert loader.batches_until(2) == 6
    for _ in range(4):
        next(loader)
    loader.close()
    assert loader.position == 52, "the fourth batch begins the next epoch"
    resumed, _ = collect(steps=1, batch_size=12, drop=True, position=36)
    assert torch.equal(resumed, collect(steps=4, batch_size=12, drop=True)[0][36:])
