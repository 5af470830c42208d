"""Damaged records in training: replaced alike at any world size, counted, and too many end the run."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pfc.data.errors import DamagedRecord, UsageError
from pfc.data.loading import loader as pipeline
from pfc.data.loading import reader as slices
from pfc.data.loading.damage import WINDOW
from pfc.data.loading.loader import TrainLoader
from pfc.data.order.balanced import BalancedOrder, group_by_identity
from pfc.data.order.orders import SampleOrder
from pfc.data.records.dataset import RecordDataset
from tests.data.pictures import SIZE, encode, pack, picture, stored

IMAGES = 40


def damage(dataset: RecordDataset, sample: int, how: str) -> None:
    """Damages a record where it lies in the file."""
    shard, position = dataset.locate(sample)
    offset = int(shard.offsets[position])
    with shard.file.path.open("r+b") as file:
        if how == "bad magic":
            file.seek(offset)
            file.write(b"\0")
        elif how == "empty":
            file.seek(offset + 4)
            file.write(np.uint32(24).tobytes())  # of the header alone
        elif how == "label":
            file.seek(offset + 12)
            file.write(np.float32(77).tobytes())
        elif how == "image":
            file.seek(offset + 32)
            file.write(bytes(40))
        else:
            raise ValueError(how)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[RecordDataset, dict[int, str]]:
    """A data set with one record of every kind of damage, and what is wrong with each."""
    folder = tmp_path_factory.mktemp("damage") / "set"
    images = [encode(picture(i)) for i in range(IMAGES)]
    images[10] = images[10][:300]  # cut off
    dataset = pack(folder, images, shards=2)
    of_key = {int(dataset.locate(i)[0].keys[dataset.locate(i)[1]]): i for i in range(IMAGES)}
    wrong = {of_key[10]: "cannot be decoded"}
    for key, how, what in [
        (3, "empty", "empty"),
        (17, "bad magic", "no record starts"),
        (18, "label", "label 77"),
        (25, "image", "decoded"),
    ]:
        damage(dataset, of_key[key], how)
        wrong[of_key[key]] = what
    return RecordDataset.open(folder), wrong


def run(dataset: RecordDataset, steps: int, batch_size: int, world_size: int = 1, **options) -> tuple:
    """Pictures [n] (bytes), labels [n], images replaced, damaged samples met."""
    loaders = [
        TrainLoader(
            dataset, batch_size=batch_size, image_size=SIZE, rank=rank, world_size=world_size, flip=False, **options
        )
        for rank in range(world_size)
    ]
    batches = [next(loader) for _ in range(steps) for loader in loaders]
    told = [loader.take_damage() for loader in loaders]
    for loader in loaders:
        loader.close()
    pictures = [image.numpy().tobytes() for batch in batches for image in batch.images]
    labels = [label for batch in batches for label in batch.labels.tolist()]
    met: dict[int, DamagedRecord] = {}
    for _, records in told:
        met.update(records)
    return pictures, labels, sum(replaced for replaced, _ in told), met


def test_damaged_samples_are_replaced_by_the_next_good_ones(damaged: tuple[RecordDataset, dict[int, str]]) -> None:
    dataset, wrong = damaged
    pictures, labels, replaced, met = run(dataset, 20, 4)  # two epochs
    order = SampleOrder(IMAGES, 0).at(np.arange(2 * IMAGES)).reshape(2, IMAGES)
    expected = []
    for epoch in order:
        for place in range(IMAGES):
            while epoch[place % IMAGES] in wrong:
                place += 1
            expected.append(int(epoch[place % IMAGES]))
    assert labels == [dataset.label(sample) for sample in expected]
    for seen, sample in zip(pictures, expected, strict=True):
        np.testing.assert_allclose(np.frombuffer(seen, np.float32), stored(dataset, sample).numpy().ravel(), atol=1e-6)
    assert replaced == 2 * len(wrong)
    assert met.keys() == wrong.keys()
    for sample, record in met.items():
        assert wrong[sample] in record.reason
        shard, position = dataset.locate(sample)
        assert (record.shard, record.key) == (shard.file.path, int(shard.keys[position]))


def test_where_nothing_can_be_decoded_the_run_ends_and_each_image_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "_ATTEMPTS", 20)
    tried: list[int] = []

    def undecodable(images: Sequence[np.ndarray], device: torch.device) -> list[int]:
        tried.append(len(images))
        return pipeline_undecodable(images, device)

    pipeline_undecodable = pipeline.undecodable
    monkeypatch.setattr(pipeline, "undecodable", undecodable)
    png = encode(picture(0))
    pixels = png.index(b"IDAT") + 4
    image = png[:pixels] + bytes(len(png) - pixels - 12) + png[-12:]
    loader = TrainLoader(pack(tmp_path / "set", [image] * 40), batch_size=8, image_size=SIZE)
    with pytest.raises(UsageError, match="20 images in a row are damaged"):
        next(loader)
    loader.close()
    assert sum(tried) <= 8 + 20


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_replacements_are_the_same_at_any_world_size_and_after_a_restart(
    damaged: tuple[RecordDataset, dict[int, str]], world_size: int
) -> None:
    dataset, _ = damaged
    pictures, labels, replaced, met = run(dataset, 10, 12)
    parts = run(dataset, 4, 12), run(dataset, 6, 12 // world_size, world_size, position=48)
    assert pictures == parts[0][0] + parts[1][0]
    assert labels == parts[0][1] + parts[1][1]
    assert replaced == parts[0][2] + parts[1][2]
    assert met.keys() == parts[0][3].keys() | parts[1][3].keys()


def test_what_is_read_ahead_is_not_counted_yet(damaged: tuple[RecordDataset, dict[int, str]]) -> None:
    dataset, wrong = damaged
    order = SampleOrder(IMAGES, 0).at(np.arange(IMAGES)).tolist()
    loader = TrainLoader(dataset, batch_size=1, image_size=SIZE)
    for place in range(IMAGES):
        next(loader)
        replaced, met = loader.take_damage()
        assert replaced == len(met) == (order[place] in wrong)
    loader.close()


def test_a_balanced_batch_keeps_its_identities(damaged: tuple[RecordDataset, dict[int, str]]) -> None:
    dataset, wrong = damaged
    # The damaged ones' labels cannot be read from the file: key mod 5 is what was packed.
    keys = [int(dataset.locate(i)[0].keys[dataset.locate(i)[1]]) for i in range(IMAGES)]
    labels = np.asarray(keys) % 5
    order = BalancedOrder(group_by_identity(labels), 0, identities=3, images=4)
    _, seen, replaced, _ = run(dataset, 30, 12, order=order)
    assert seen == labels[order.at(np.arange(360))].tolist()
    assert replaced == int(np.isin(order.at(np.arange(360)), list(wrong)).sum())


def test_too_many_damaged_images_end_the_run_in_one_line(tmp_path: Path) -> None:
    images = [encode(picture(i)) for i in range(40)]
    for place in range(0, 40, 2):
        images[place] = b"no image"
    dataset = pack(tmp_path / "set", images, shards=1)
    loader = TrainLoader(dataset, batch_size=4, image_size=SIZE, max_damaged=12 / WINDOW)
    told = r"'set': 1\d of the last \d\d images .* data.max_damaged .*key \d+ at"
    with pytest.raises(UsageError, match=told) as caught:
        list(islice(loader, 20))
    assert "\n" not in str(caught.value)
    assert loader.position < 60
    loader.close()


def test_a_run_without_any_good_image_ends(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "set", [b"no image"] * 12, shards=1)
    loader = TrainLoader(dataset, batch_size=4, image_size=SIZE, max_damaged=1.0)
    with pytest.raises(UsageError, match="images in a row are damaged"):
        next(loader)
    loader.close()


def test_none_at_all_can_be_asked_for(damaged: tuple[RecordDataset, dict[int, str]]) -> None:
    loader = TrainLoader(damaged[0], batch_size=8, image_size=SIZE, max_damaged=0.0)
    with pytest.raises(UsageError, match="allow more"):
        list(islice(loader, 5))
    loader.close()
