"""Made-up images: the same for a seed, different between identities, alike within one."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfc.data.errors import UsageError
from pfc.data.glyphs.synthetic import pack_synthetic
from pfc.data.records.dataset import RecordDataset


def pixels(ds: RecordDataset) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N] and images [N, H, W, 3]."""
    images = [np.asarray(Image.open(io.BytesIO(ds.read(i)[1].tobytes()))) for i in range(len(ds))]
    return ds.labels(), np.stack(images).astype(np.float32)


def test_numbers_and_sizes(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    summary = pack_synthetic(
        tmp_path / "s",
        identities=6,
        images_per_identity=5,
        size=(24, 32),
        shards=2,
        workers=1,
        progress=lambda *a: calls.append(a),
    )
    assert (summary.images, summary.identities, summary.shards) == (30, 6, 2)
    assert calls[-1] == (30, 30)
    ds = RecordDataset.open(tmp_path / "s")
    labels, images = pixels(ds)
    assert images.shape == (30, 24, 32, 3)
    assert ds.image_size == (24, 32)
    assert np.bincount(labels).tolist() == [5] * 6
    assert labels.tolist() != sorted(labels)


def test_an_identity_looks_like_itself(tmp_path: Path) -> None:
    pack_synthetic(tmp_path / "s", identities=6, images_per_identity=5, size=32, workers=1)
    labels, images = pixels(RecordDataset.open(tmp_path / "s"))
    features = images.reshape(30, -1) - images.reshape(30, -1).mean(axis=1, keepdims=True)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features @ features.T
    same = labels[:, None] == labels[None]
    assert cosines[same].mean() > cosines[~same].mean() + 0.3
    assert len({image.tobytes() for image in images}) == 30


def test_only_the_seed_counts(tmp_path: Path) -> None:
    for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        pack_synthetic(tmp_path / name, identities=4, images_per_identity=3, size=16, seed=seed, workers=workers)
    a, b, c = ((tmp_path / name / "train.rec").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("wrong", [{"identities": 0}, {"images_per_identity": -1}, {"size": 0}])
def test_impossible_numbers(wrong: dict[str, int], tmp_path: Path) -> None:
    numbers = {"identities": 2, "images_per_identity": 2, "size": 8} | wrong
    with pytest.raises(UsageError, match="at least 1"):
        pack_synthetic(tmp_path / "s", workers=1, **numbers)
    assert not list(tmp_path.iterdir())
