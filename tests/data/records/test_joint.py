"""Several data sets as one."""

from pathlib import Path

import numpy as np
import pytest

from pfc.data.errors import UsageError
from pfc.data.loading.loader import TrainLoader
from pfc.data.order.mixed import MixedOrder
from pfc.data.order.orders import BlockOrder, SampleOrder
from pfc.data.records.dataset import RecordDataset
from pfc.data.records.joint import JointDataset
from tests.data.pictures import SIZE, collect, encode, pack, picture, stored


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("mixture")
    pack(folder / "a", [encode(picture(i)) for i in range(20)], identities=4)
    pack(folder / "b", [encode(picture(100 + i)) for i in range(33)], identities=3, shards=1)
    return [folder / "a", folder / "b"]


def test_labels_are_offset_set_by_set(folders: list[Path]) -> None:
    a, b = (RecordDataset.open(folder) for folder in folders)
    joint = JointDataset.open(folders)
    assert isinstance(joint, JointDataset)
    assert (len(joint), joint.num_classes, joint.told_classes, joint.name) == (53, 7, 7, "a+b")
    assert joint.image_size == SIZE
    assert joint.labels().tolist() == a.labels().tolist() + [label + 4 for label in b.labels().tolist()]
    for index in (0, 19, 20, 52):
        label, image = joint.read(index)
        assert label == joint.labels()[index] == joint.label(index)
        assert image.tobytes() == (a.read(index) if index < 20 else b.read(index - 20))[1].tobytes()
    assert joint.locate(20)[0].file.path == folders[1] / "train.rec"
    with pytest.raises(IndexError):
        joint.read(53)
    assert isinstance(JointDataset.open(folders[:1]), RecordDataset)


def test_an_epoch_of_a_joint_set_shows_each_picture_once(folders: list[Path]) -> None:
    joint = JointDataset.open(folders)
    order = MixedOrder([SampleOrder(20, 0), SampleOrder(33, 0)], [1, 1])
    images, labels = collect(joint, 53, 2, order=order, flip=False)
    samples = order.at(np.arange(106)).tolist()
    assert sorted(samples[:53]) == list(range(53))
    sets = [RecordDataset.open(folder) for folder in folders]
    for image, label, sample in zip(images, labels.tolist(), samples, strict=True):
        which, within = (0, sample) if sample < 20 else (1, sample - 20)
        assert label == 4 * which + sets[which].label(within)
        np.testing.assert_allclose(image, stored(sets[which], within), atol=1e-6)


def test_weights_and_blocks_at_another_world_size(folders: list[Path]) -> None:
    joint = JointDataset.open(folders)
    order = MixedOrder([SampleOrder(20, 0), BlockOrder(33, 0, block_size=4, window=8)], [3, 0.5])
    one = collect(joint, 6, 12, order=order)
    four = collect(joint, 6, 3, 4, order=order)
    assert (one[0] == four[0]).all()
    assert (one[1] == four[1]).all()


def test_epochs_are_counted_in_joint_ones(folders: list[Path]) -> None:
    order = MixedOrder([SampleOrder(20, 0), SampleOrder(33, 0)], [2, 1])
    loader = TrainLoader(JointDataset.open(folders), batch_size=10, image_size=SIZE, order=order)
    assert loader.epoch_size == 73
    assert loader.batches_until(2) == 15
    next(loader)
    assert loader.epoch == pytest.approx(10 / 73)
    assert loader.batches_until(2) == 14
    loader.close()


def test_the_turns_of_long_epochs_are_exact_and_too_long_ones_are_refused() -> None:
    order = MixedOrder([SampleOrder(3_000_000_000, 0), SampleOrder(20, 0)], [1, 1])
    last = order.epoch_size - 1
    assert 0 <= order.at(np.array([last]))[0] < last + 1
    assert order.visits(np.array([last, last + 1])).tolist() == [0, 1]
    for weights in ([2, 1], [1, 1e10]):
        with pytest.raises(UsageError, match="take smaller weights"):
            MixedOrder([SampleOrder(3_000_000_000, 0), SampleOrder(20, 0)], weights)
