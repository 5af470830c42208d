"""What two sets share and which labels look wrong, of embeddings in which it was planted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from pfc.data.errors import UsageError
from pfc.engine.review.embedded import Batch, Embedded, halves, store
from pfc.engine.review.labels import merged, merged_threshold, outlier_threshold, outliers, splits
from pfc.engine.review.overlap import between, duplicates, shared_identities

D, NOISE = 64, 0.08  # a cosine of about 0.7 of two images of one identity, of 0 ± 0.125 of two identities


def people(number: int, seed: int) -> Tensor:
    return normalize(torch.randn(number, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def photographs(person: Tensor, count: int, seed: int) -> Tensor:
    """[D] or [P, D] → [P · count, D]."""
    who = person.view(-1, D).repeat_interleave(count, dim=0)
    return normalize(who + NOISE * torch.randn(who.shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def keep(folder: Path, rows: Tensor, labels: NDArray[np.int64], images: list[bytes] | None = None) -> Embedded:
    """As a verb does, in two batches of embeddings that are not of length 1."""
    images = images or [f"{folder} {i}".encode() for i in range(len(rows))]
    cut = len(rows) // 3 + 1
    parts = (slice(0, cut), slice(cut, len(rows)))
    batches = [Batch(np.arange(len(rows))[part], labels[part], 3 * rows[part], images[part]) for part in parts]
    folder.mkdir(exist_ok=True)
    return store(iter(batches), len(rows) + 2, folder / "rows.npy")  # two could not be read


def whole(folder: Path, identities: int = 60, count: int = 8, seed: int = 0) -> tuple[Tensor, NDArray[np.int64]]:
    return photographs(people(identities, seed), count, seed + 1), np.repeat(np.arange(identities), count)


def test_embeddings_are_kept_as_they_came(tmp_path: Path):
    rows, labels = whole(tmp_path, identities=3, count=4)
    kept = keep(tmp_path, rows, 2 * labels)  # the labels 1, 3 have no image
    torch.testing.assert_close(kept.rows, rows)
    np.testing.assert_array_equal(kept.labels, [0, 2, 4])
    np.testing.assert_array_equal(kept.codes, labels)
    np.testing.assert_array_equal(np.stack(kept.members), np.arange(12).reshape(3, 4))
    torch.testing.assert_close(kept.sums(), rows.view(3, 4, D).sum(dim=1))
    chosen = np.arange(12) % 4 == 1
    torch.testing.assert_close(kept.sums(chosen), rows[1::4])


def test_nothing_read_and_a_diverged_run_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="no image could be read"):
        store(iter([]), 5, tmp_path / "rows.npy")
    with pytest.raises(UsageError, match="not finite"):
        keep(tmp_path, torch.full((4, D), torch.nan), np.arange(4))


def test_shared_identities_are_found(tmp_path: Path):
    rows, labels = whole(tmp_path)
    train = keep(tmp_path / "train", rows, labels)
    who = torch.cat([people(60, 0)[[7, 30, 31]], people(20, 50)])
    test = keep(tmp_path / "test", photographs(who, 5, 90), np.repeat(np.arange(23), 5))
    limit = between(train, 0.99)
    found = shared_identities(train, test, [(7, 0), (3, 22), (5, 99)])  # 99 has no image
    assert {(pair.train, pair.test) for pair in found if pair.cosine >= limit} == {(7, 0), (30, 1), (31, 2)}
    assert [pair.cosine for pair in found] == sorted((pair.cosine for pair in found), reverse=True)
    assert {pair.train for pair in found} == set(range(60))
    assert {(pair.train, pair.test) for pair in found if pair.same_name} == {(7, 0), (3, 22)}
    first = next(pair for pair in found if pair.train == 7)
    cosines = train.rows[56:64] @ test.rows[:5].T
    assert train.rows[first.train_row] @ test.rows[first.test_row] == cosines.max()
    expected = normalize(rows[56:64].sum(dim=0), dim=0) @ normalize(test.rows[:5].sum(dim=0), dim=0)
    assert first.cosine == pytest.approx(float(expected), abs=1e-5)


def test_the_threshold_is_that_of_the_training_set_itself(tmp_path: Path):
    rows, labels = whole(tmp_path)
    train = keep(tmp_path, rows, labels)
    means = normalize(train.sums(), dim=1).double()
    cosines = (means @ means.T).fill_diagonal_(-1).amax(dim=1).numpy()
    assert between(train, 0.9) == pytest.approx(np.quantile(cosines, 0.9), abs=1e-5)
    assert halves(train).mean() > 0.85 > between(train, 0.99)
    with pytest.raises(UsageError, match="one identity"):
        between(keep(tmp_path / "one", rows[:8], labels[:8]), 0.99)


def test_duplicates_by_bytes_and_by_cosine(tmp_path: Path):
    rows, labels = whole(tmp_path, identities=10)
    images = [str(i).encode() for i in range(80)]
    train = keep(tmp_path / "train", rows, labels, images)
    other = photographs(people(10, 99), 3, 5)
    other[4] = normalize(rows[17] + 0.01 * other[4], dim=0)  # nearly the same
    seen = [f"test {i}".encode() for i in range(30)]
    seen[9] = images[33]  # the same bytes; what the network says of them does not matter
    test = keep(tmp_path / "test", other, np.arange(30), seen)
    found = duplicates(train, test, 0.95)
    assert [(one.train_row, one.test_row, one.same_bytes) for one in found] == [(33, 9, True), (17, 4, False)]
    assert found[0].cosine == 1
    assert 0.99 < found[1].cosine < 1


def test_every_copy_in_the_training_set_is_listed(tmp_path: Path):
    rows, labels = whole(tmp_path, identities=4)
    rows[[3, 20]] = rows[9].clone()
    train = keep(tmp_path / "train", rows, labels)
    test = keep(tmp_path / "test", rows[9:10], np.zeros(1, np.int64))
    assert {one.train_row for one in duplicates(train, test, 0.99)} == {3, 9, 20}


def test_mislabelled_images_are_found(tmp_path: Path):
    rows, labels = whole(tmp_path)
    wrong = np.arange(5, 480, 40)
    given = labels.copy()
    given[wrong] = (labels[wrong] + 7) % 60
    found = outliers(keep(tmp_path, rows, given))
    assert set(wrong) <= set(found.rows)
    assert len(found.rows) <= len(wrong) + 1  # a threshold from shares may take one more
    planted = np.isin(found.rows, wrong)
    np.testing.assert_array_equal(found.code[planted], labels[found.rows[planted]])
    assert (np.diff(found.own[found.rows]) >= 0).all()


def test_clean_data_give_next_to_nothing(tmp_path: Path):
    kept = keep(tmp_path, *whole(tmp_path, identities=100, count=10))
    far = outliers(kept)
    assert len(far.rows) == 0
    assert merged(kept, merged_threshold(kept)) == []
    assert splits(kept, far.limit) == []


def test_two_labels_of_one_person_are_found(tmp_path: Path):
    rows, labels = whole(tmp_path)
    given = labels.copy()
    given[labels == 11] = np.where(np.arange(8) % 2, 11, 60)  # the label 60 is a part of 11
    kept = keep(tmp_path, rows, given)
    ((a, b, cosine),) = merged(kept, 0.8)
    assert (a, b) == (11, 60)
    means = normalize(kept.sums(), dim=1)
    assert cosine == pytest.approx(float(means[11] @ means[60]), abs=1e-5)
    assert between(kept, 0.9) < 0.6 < merged_threshold(kept)


def test_a_label_of_two_people_is_found(tmp_path: Path):
    rows, labels = whole(tmp_path)
    given = labels.copy()
    theirs = np.flatnonzero(labels == 20)[:3]
    given[theirs] = 4
    apart = np.flatnonzero(labels == 40)[:2]  # two images are no half
    given[apart] = 9
    kept = keep(tmp_path, rows, given)
    (found,) = splits(kept, outliers(kept).limit)
    assert found.code == 4
    np.testing.assert_array_equal(found.smaller, theirs)
    np.testing.assert_array_equal(found.larger, np.flatnonzero(labels == 4))
    assert found.cosine < 0.4


def test_images_that_are_like_nothing_are_no_second_person(tmp_path: Path):
    rows, labels = whole(tmp_path)
    rows[[0, 1, 2]] = people(3, 77)  # of the first label, each of somebody else
    kept = keep(tmp_path, rows, labels)
    far = outliers(kept)
    assert {0, 1, 2} <= set(far.rows)
    assert splits(kept, far.limit) == []


def test_identities_of_one_or_two_images_have_no_outliers(tmp_path: Path):
    rows, labels = whole(tmp_path)
    one, two = people(1, 300), people(2, 301)
    kept = keep(tmp_path, torch.cat([rows, one, two]), np.concatenate([labels, [60, 61, 61]]))
    far = outliers(kept)
    assert len(far.rows) == 0
    assert np.isnan(far.own[480])
    assert far.own[481] == pytest.approx(float(two[0] @ two[1]), abs=1e-5)
    assert splits(kept, far.limit) == []

    alone = keep(tmp_path / "alone", people(5, 1), np.arange(5))
    assert len(outliers(alone).rows) == 0
    with pytest.raises(UsageError, match="no identity has two images"):
        merged_threshold(alone)
    with pytest.raises(UsageError, match="one identity"):
        outliers(keep(tmp_path / "single", people(5, 1), np.zeros(5, np.int64)))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3])
def test_the_threshold_of_outliers_follows_from_how_many_there_are(share: float):
    """Cosines of known kinds that lie over each other: no threshold divides them without mistakes."""
    generator = np.random.default_rng(0)
    strangers = generator.normal(0, 0.15, 20000).astype(np.float32)
    own = generator.normal(0.6, 0.15, 20000).astype(np.float32)
    wrong = np.arange(20000) < 20000 * share
    own[wrong] = generator.normal(0, 0.15, int(wrong.sum()))
    threshold, told = outlier_threshold(own, strangers)
    assert told == pytest.approx(share, abs=0.005)
    listed = own < threshold
    if share == 0:
        assert listed.sum() <= 5
        return

    def gain(t: float) -> float:
        return (own[wrong] < t).sum() - (own[~wrong] < t).sum() / 5

    best = max(gain(t) for t in np.linspace(-0.5, 1, 301))  # with the kinds known
    assert gain(threshold) > 0.98 * best


def test_a_threshold_of_outliers_may_be_chosen(tmp_path: Path):
    rows, labels = whole(tmp_path, identities=20)
    kept = keep(tmp_path, rows, labels)
    means = normalize(kept.sums()[torch.from_numpy(kept.codes)] - kept.rows, dim=1)
    own = (kept.rows * means).sum(dim=1).numpy()
    chosen = float(np.median(own))
    found = outliers(kept, chosen)
    assert found.threshold == chosen
    np.testing.assert_array_equal(np.sort(found.rows), np.flatnonzero(own < chosen))
