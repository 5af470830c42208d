"""A run stopped in the middle of an epoch goes on at exactly the next sample, on any number of ranks."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pfc.data.order.balanced import BalancedOrder, group_by_identity
from pfc.data.order.mixed import MixedOrder
from pfc.data.order.orders import BlockOrder, Order, SampleOrder
from pfc.data.records.dataset import RecordDataset
from tests.data.pictures import collect, encode, pack, picture

IMAGES = 62
ORDERS: dict[str, Order] = {
    "global": SampleOrder(IMAGES, 0),
    "blocks": BlockOrder(IMAGES, 0, block_size=5, window=16),
    "mixed": MixedOrder([SampleOrder(IMAGES, 0)], [1.0]),
    "balanced": BalancedOrder(group_by_identity(np.arange(IMAGES) % 5), 0, identities=4, images=3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "set"
    pack(path, [encode(picture(i)) for i in range(IMAGES)], identities=IMAGES)  # a label names a picture
    return path


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_stopped_on_two_ranks_and_continued(folder: Path, order: str, world_size: int) -> None:
    """A global batch of 12, stopped after 36 of an epoch's 62 images, to the end of the second epoch."""
    dataset = RecordDataset.open(folder)
    options = {"order": ORDERS[order], "flip": True}
    images, labels = collect(dataset, 11, 12, **options)
    before = collect(dataset, 3, 6, 2, **options)
    after = collect(dataset, 8, 12 // world_size, world_size, position=36, **options)
    seen = before[1].tolist() + after[1].tolist()
    assert seen == labels.tolist(), "the same global order"
    assert (np.concatenate([before[0], after[0]]) == images.numpy()).all()
    assert seen == dataset.labels()[ORDERS[order].at(np.arange(132))].tolist()
    if order != "balanced":
        once = Counter(range(IMAGES))
        assert Counter(seen[:IMAGES]) == Counter(seen[IMAGES : 2 * IMAGES]) == once


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_another_global_batch_goes_on_at_the_next_sample_too(folder: Path, world_size: int) -> None:
    dataset = RecordDataset.open(folder)
    before = collect(dataset, 3, 6, 2)[1]
    after = collect(dataset, 6, 5, world_size, position=36)[1]
    expected = dataset.labels()[SampleOrder(IMAGES, 0).at(np.arange(36 + 30 * world_size))]
    assert [*before.tolist(), *after.tolist()] == expected.tolist()
