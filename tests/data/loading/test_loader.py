"""TrainLoader and decode_images: the right pictures, in the right order, whatever the world size."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pfc.data.errors import UsageError
from pfc.data.loading import plain as plain_module
from pfc.data.loading.decoding import decode_images
from pfc.data.loading.loader import TrainLoader
from pfc.data.order.orders import SampleOrder
from pfc.data.records.dataset import RecordDataset
from tests.data.pictures import SIZE, as_tensor, collect, encode, pack, picture, stored

IMAGES = 26


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> RecordDataset:
    return pack(tmp_path_factory.mktemp("pipeline") / "set", [encode(picture(i)) for i in range(IMAGES)])


def test_batches_hold_the_stored_pictures_in_the_sample_order(dataset: RecordDataset) -> None:
    images, labels = collect(dataset, steps=9, batch_size=6, seed=4, flip=False)  # a batch crosses each epoch's end
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    samples = SampleOrder(IMAGES, seed=4).at(np.arange(54)).tolist()
    torch.testing.assert_close(images, torch.stack([stored(dataset, sample) for sample in samples]))
    assert labels.tolist() == [dataset.label(sample) for sample in samples]


def test_every_epoch_shows_each_sample_once(dataset: RecordDataset) -> None:
    images, _ = collect(dataset, steps=13, batch_size=4, flip=False)  # two epochs of 26
    for epoch in images.split(IMAGES):
        assert len({image.numpy().tobytes() for image in epoch}) == IMAGES


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_world_size_changes_nothing_in_the_global_batches(dataset: RecordDataset, world_size: int) -> None:
    one = collect(dataset, steps=5, batch_size=12, seed=1)
    many = collect(dataset, steps=5, batch_size=12 // world_size, world_size=world_size, seed=1)
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])


def test_a_loader_goes_on_at_any_position_and_world_size(dataset: RecordDataset) -> None:
    whole, labels = collect(dataset, steps=10, batch_size=6)
    loader = TrainLoader(dataset, batch_size=6, image_size=SIZE)
    for _ in range(3):
        next(loader)
    assert loader.position == 18  # what was handed out, not what is being prefetched
    rest, rest_labels = collect(dataset, steps=7, batch_size=3, world_size=2, position=loader.position)
    assert torch.equal(rest, whole[18:])
    assert torch.equal(rest_labels, labels[18:])


def test_flips_depend_on_seed_epoch_and_sample_alone(dataset: RecordDataset) -> None:
    def flips(seed: int, batch_size: int) -> np.ndarray:
        """bool [4, IMAGES]: whether each sample is mirrored in each of four epochs."""
        images, _ = collect(dataset, steps=4 * IMAGES // batch_size, batch_size=batch_size, seed=seed)
        samples = SampleOrder(IMAGES, seed).at(np.arange(4 * IMAGES))
        mirrored = np.zeros((4, IMAGES), dtype=bool)
        for position, (image, sample) in enumerate(zip(images, samples.tolist(), strict=True)):
            original = stored(dataset, sample)
            mirrored[position // IMAGES, sample] = torch.allclose(image, original.flip(2), atol=1e-5)
            assert mirrored[position // IMAGES, sample] or torch.allclose(image, original, atol=1e-5)
        return mirrored

    first = flips(0, 13)
    np.testing.assert_array_equal(first, flips(0, 8))
    assert 0.3 < first.mean() < 0.7
    assert (first[0] != first[1]).any()
    assert (first != flips(1, 13)).any()


def test_batches_stay_valid_after_later_steps_and_close(dataset: RecordDataset) -> None:
    loader = TrainLoader(dataset, batch_size=6, image_size=SIZE)
    held = [next(loader) for _ in range(12)]
    copies = [batch.images.clone() for batch in held]
    for _ in range(20):
        next(loader)
    loader.close()
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(held, copies, strict=True))
    held[0].images.zero_()  # the caller's own
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_other_sizes_are_scaled_to_cover_and_cropped_at_the_centre(dataset: RecordDataset) -> None:
    halves = np.zeros((40, 80, 3), dtype=np.uint8)
    halves[:, 20:60] = 255  # the middle 40 × 40 of it
    (images,) = decode_images([encode(halves)], image_size=(20, 20), batch_size=1)
    assert images.shape == (1, 3, 20, 20)
    assert images[..., 1:-1].min() > 0.99  # away from the interpolated border
    batch = next(TrainLoader(dataset, batch_size=2, image_size=(12, 10)))
    assert batch.images.shape == (2, 3, 12, 10)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP"])
@pytest.mark.parametrize(
    "odd", [(5, 5), (90, 70), SIZE[::-1], SIZE], ids=["smaller", "larger", "turned", "turned away"]
)
def test_images_of_another_size_than_the_sets_are_scaled_too(
    odd: tuple[int, int], form: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(plain_module, "compiled", lambda: None)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    images = [encode(picture(i), form) for i in range(40)]
    for number in (11, 30):
        file = io.BytesIO()
        options = {"exif": exif} if sorted(odd) == sorted(SIZE) and form != "BMP" else {}
        Image.fromarray(picture(number, odd)).save(file, form, **options)
        images[number] = file.getvalue()
    dataset = pack(tmp_path / "set", images)
    assert dataset.image_size == SIZE
    found, labels = collect(dataset, steps=16, batch_size=5, seed=1)
    dataset.image_size = None  # so that every image is fitted from the start
    expected, _ = collect(dataset, steps=16, batch_size=5, seed=1)
    assert torch.equal(found, expected)
    assert len(labels) == 80


def test_evaluation_keeps_the_order_and_the_short_rest() -> None:
    pictures = [picture(i, (16, 16)) for i in range(11)]
    encoded = [encode(p) for p in pictures]
    encoded[3] = np.frombuffer(encoded[3], dtype=np.uint8)  # type: ignore[call-overload]
    tensors = list(decode_images(encoded, image_size=(16, 16), batch_size=4))
    assert [len(tensor) for tensor in tensors] == [4, 4, 3]
    torch.testing.assert_close(torch.cat(tensors), torch.stack([as_tensor(p) for p in pictures]))


def test_gray_and_jpeg_images_become_rgb() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16), 200, dtype=np.uint8)).save(file, "JPEG")
    (images,) = decode_images([file.getvalue()], image_size=(16, 16), batch_size=1)
    torch.testing.assert_close(images, torch.full((1, 3, 16, 16), 200 / 127.5 - 1), atol=0.02, rtol=0)


def test_an_evaluation_image_that_cannot_be_decoded_is_named() -> None:
    images = [encode(picture(i)) for i in range(8)]
    images[5] = images[5][:60]
    with pytest.raises(RuntimeError, match="image 5 cannot be decoded"):
        list(decode_images(images, image_size=SIZE, batch_size=2))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_rest_of_an_epoch_is_left_out_on_all_ranks(dataset: RecordDataset, world_size: int) -> None:
    images, labels = collect(dataset, 9, 8 // world_size, world_size, flip=False, drop=True)  # 3 batches of 26 images
    positions = np.concatenate([epoch * IMAGES + np.arange(24) for epoch in range(3)])
    samples = SampleOrder(IMAGES, seed=0).at(positions).tolist()
    assert labels.tolist() == [dataset.label(sample) for sample in samples]
    torch.testing.assert_close(images, torch.stack([stored(dataset, sample) for sample in samples]))


def test_what_would_leave_nothing_is_refused(dataset: RecordDataset) -> None:
    with pytest.raises(UsageError, match="leaves nothing of the 26 images"):
        TrainLoader(dataset, batch_size=27, image_size=SIZE, drop=True)


def test_without_dali_the_message_says_what_to_install(dataset: RecordDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UsageError, match=r"is not installed: pip install 'pfc\[cuda1[23]\]'"):
        TrainLoader(dataset, batch_size=2, image_size=SIZE)
