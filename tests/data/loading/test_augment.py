"""Augmentations: what they do, how often, and that pictures depend on (seed, epoch, sample) alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pfc.data.glyphs.synthetic import pack_synthetic
from pfc.data.loading.augment import Augment, draw_flips
from pfc.data.loading.loader import TrainLoader
from pfc.data.order.orders import SampleOrder
from pfc.data.records.dataset import RecordDataset
from tests.data.pictures import SIZE, collect, encode, pack, picture

NAMES = ["crop", "colour", "gray", "low_resolution", "blur", "jpeg", "cutout"]
ALL = Augment.model_validate({name: {"probability": 0.5} for name in NAMES})


def only(name: str, probability: float = 1.0, **options: object) -> Augment:
    return Augment.model_validate({name: {"probability": probability, **options}})


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> RecordDataset:
    return pack(tmp_path_factory.mktemp("augment") / "noise", [encode(picture(i)) for i in range(26)])


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> RecordDataset:
    folder = tmp_path_factory.mktemp("augment") / "smooth"
    pack_synthetic(folder, identities=8, images_per_identity=4, size=SIZE, workers=1)
    return RecordDataset.open(folder)


def batch(dataset: RecordDataset, augment: Augment) -> torch.Tensor:
    return collect(dataset, 1, 24, flip=False, augment=augment)[0]


@pytest.mark.parametrize(("batch_size", "world_size"), [(12, 1), (6, 2), (4, 3), (24, 1)])
def test_pictures_do_not_depend_on_ranks_and_batches(noise: RecordDataset, batch_size: int, world_size: int) -> None:
    steps = 72 // (batch_size * world_size)
    images, _ = collect(noise, steps, batch_size, world_size, seed=3, augment=ALL)
    expected, _ = collect(noise, 9, 8, seed=3, augment=ALL)
    assert torch.equal(images, expected)


def test_pictures_do_not_depend_on_restarts(noise: RecordDataset) -> None:
    whole, _ = collect(noise, 9, 8, augment=ALL)
    rest, _ = collect(noise, 5, 4, world_size=2, position=32, augment=ALL)
    assert torch.equal(rest, whole[32:])


def test_a_sample_looks_different_in_every_epoch_and_seed(noise: RecordDataset) -> None:
    images, _ = collect(noise, 13, 4, augment=ALL)
    order = SampleOrder(26, 0).at(np.arange(52))
    first, second = images[np.argsort(order[:26])], images[26 + np.argsort(order[26:])]
    assert sum(torch.equal(a, b) for a, b in zip(first, second, strict=True)) < 8
    drawn = [ALL.draw(seed, np.zeros(26, dtype=np.int64), np.arange(26)) for seed in (0, 1)]
    assert any((drawn[0][name] != drawn[1][name]).any() for name in NAMES)


def test_what_is_not_drawn_is_exactly_as_without(noise: RecordDataset) -> None:
    never = Augment.model_validate({name: {"probability": 1e-12} for name in NAMES})
    assert never.active == NAMES
    assert torch.equal(batch(noise, never), batch(noise, Augment()))
    assert Augment().active == []


@pytest.mark.parametrize("name", NAMES)
def test_each_changes_the_pictures_that_it_was_drawn_for(smooth: RecordDataset, name: str) -> None:
    plain, augmented = batch(smooth, Augment()), batch(smooth, only(name, 0.5))
    samples = SampleOrder(len(smooth), 0).at(np.arange(24))
    drawn = only(name, 0.5).draw(0, np.zeros(24, dtype=np.int64), samples)[name]
    assert 4 < drawn.sum() < 20
    changes = (augmented - plain).abs().mean(dim=(1, 2, 3)).numpy()
    assert (changes[drawn.astype(bool)] > 0.001).all()
    assert (changes[~drawn.astype(bool)] == 0).all()


def test_they_do_what_they_are_called(smooth: RecordDataset) -> None:
    plain = batch(smooth, Augment())
    gray = batch(smooth, only("gray"))
    assert torch.equal(gray[:, 0], gray[:, 1])
    assert torch.equal(gray[:, 0], gray[:, 2])

    def detail(images: torch.Tensor) -> torch.Tensor:
        return images.diff(dim=3).abs().mean(dim=(1, 2, 3))

    assert (detail(batch(smooth, only("blur", sigma=[2.0, 2.0]))) < 0.8 * detail(plain)).all()
    assert (detail(batch(smooth, only("low_resolution", scale=[0.2, 0.2]))) < 0.9 * detail(plain)).all()

    cut = batch(smooth, only("cutout", area=[0.25, 0.25], aspect=[1.0, 1.0]))
    share = ((cut - plain).abs().sum(dim=1) > 0).float().mean(dim=(1, 2))
    torch.testing.assert_close(share, torch.full((24,), 0.25), atol=0.06, rtol=0)
    assert cut[(cut != plain)].abs().max() < 0.01, "gray"

    whole = batch(smooth, only("crop", area=[1.0, 1.0], aspect=[1.0, 1.0]))
    torch.testing.assert_close(whole, plain, atol=0.02, rtol=0)

    dark = {"brightness": 1.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    factors = only("colour", **dark).draw(0, np.zeros(24, dtype=np.int64), SampleOrder(32, 0).at(np.arange(24)))
    means = (batch(smooth, only("colour", **dark)) + 1).mean(dim=(1, 2, 3)) / (plain + 1).mean(dim=(1, 2, 3))
    darker = factors["colour_brightness"] < 1  # brighter ones are cut off at white
    np.testing.assert_allclose(means.numpy()[darker], factors["colour_brightness"][darker], atol=0.03)


def test_each_has_its_probability_and_ranges() -> None:
    count = 40_000
    augment = Augment.model_validate({name: {"probability": 0.1 * (place + 1)} for place, name in enumerate(NAMES)})
    drawn = augment.draw(5, np.arange(count) // 1000, np.arange(count) % 1000)
    for place, name in enumerate(NAMES):
        assert abs(drawn[name].mean() - 0.1 * (place + 1)) < 0.01
        others = [drawn[other].astype(float) for other in NAMES if other != name]
        assert all(abs(np.corrcoef(drawn[name].astype(float), other)[0, 1]) < 0.03 for other in others)
    assert abs(draw_flips(5, np.arange(count), np.arange(count)).mean() - 0.5) < 0.01
    for name, low, high in [
        ("low_resolution_scale", 0.25, 1.0),
        ("blur_sigma", 0.3, 2.0),
        ("jpeg_quality", 20, 80),
        ("colour_hue", -5, 5),
        ("colour_contrast", 0.7, 1.3),
    ]:
        assert low <= drawn[name].min() < low + 0.1 * (high - low)
        assert high >= drawn[name].max() > high - 0.1 * (high - low)
    start, end = drawn["crop_start"], drawn["crop_end"]
    assert start.min() >= 0
    assert end.max() <= 1 + 1e-6
    area = np.prod(end - start, axis=1)
    assert area.max() <= 1
    assert 0.6 < area.min() < 0.72, "a part that would reach beyond the picture is cut at its border"


def test_one_more_augmentation_leaves_the_others_numbers_alone() -> None:
    visits, samples = np.zeros(50, dtype=np.int64), np.arange(50)
    alone = only("blur").draw(1, visits, samples)
    together = ALL.draw(1, visits, samples)
    np.testing.assert_array_equal(alone["blur_sigma"], together["blur_sigma"])


def test_images_of_other_sizes_can_be_augmented(noise: RecordDataset) -> None:
    loader = TrainLoader(noise, batch_size=8, image_size=(12, 16), augment=ALL)
    assert next(loader).images.shape == (8, 3, 12, 16)
    loader.close()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"blur": {"probability": 1.5}}, "less than or equal to 1"),
        ({"blur": {"sigma": [2.0, 1.0]}}, r"sigma: found \[2, 1\], allowed: \[low, high\] within"),
        ({"jpeg": {"quality": [0.0, 50.0]}}, "quality: found"),
        ({"crop": {"area": [0.5]}}, "at least 2 items"),
        ({"sharpen": {}}, "Extra inputs"),
    ],
)
def test_impossible_values_are_refused(tree: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Augment.model_validate(tree)


def test_a_data_set_of_one_image_can_be_augmented(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "one", [encode(picture(0))], identities=1, shards=1)
    images, _ = collect(dataset, 2, 3, augment=ALL)
    assert images.shape == (6, 3, *SIZE)


def test_a_crop_keeps_the_proportions_of_an_image_of_another_shape(tmp_path: Path) -> None:
    for name, shape in (("wide", (40, 80)), ("high", (80, 40))):
        centre = np.zeros((*shape, 3), dtype=np.uint8)
        top, left = (shape[0] - 40) // 2, (shape[1] - 40) // 2
        centre[top : top + 40, left : left + 40] = 255
        dataset = pack(tmp_path / name, [encode(centre)] * 10)
        loader = TrainLoader(dataset, batch_size=10, image_size=(20, 20), augment=only("crop", area=[0.5, 1.0]))
        assert next(loader).images[..., 1:-1, 1:-1].min() > 0.99, "only the centre is seen, as without the crop"
        loader.close()
