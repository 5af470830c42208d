"""The orders: functions of (seed, position); every epoch covers each sample once, or each identity in its turn."""

import numpy as np
import pytest

from pfc.data.errors import UsageError
from pfc.data.order.balanced import BalancedOrder, group_by_identity
from pfc.data.order.mixed import MixedOrder, PartedOrder
from pfc.data.order.orders import BlockOrder, Order, SampleOrder, counter_hash

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 255, 257, 1000, 4097, 99_991]


@pytest.mark.parametrize("num_samples", SIZES)
def test_each_epoch_covers_every_sample_once(num_samples: int) -> None:
    order = SampleOrder(num_samples, seed=3)
    samples = order.at(np.arange(3 * num_samples))
    for epoch in range(3):
        part = samples[epoch * num_samples : (epoch + 1) * num_samples]
        np.testing.assert_array_equal(np.sort(part), np.arange(num_samples))


def test_large_data_sets_stay_in_range_and_do_not_collide() -> None:
    num_samples = 42_000_000_003
    samples = SampleOrder(num_samples, seed=1).at(np.arange(10**9, 10**9 + 100_000))
    assert samples.min() >= 0
    assert samples.max() < num_samples
    assert len(np.unique(samples)) == len(samples)


def test_any_slice_of_positions_gives_the_same_samples() -> None:
    order = SampleOrder(101, seed=5)
    whole = order.at(np.arange(400))
    np.testing.assert_array_equal(order.at(np.arange(90, 115)), whole[90:115])  # across the border of two epochs
    shuffled = np.random.default_rng(0).permutation(400)
    np.testing.assert_array_equal(order.at(shuffled), whole[shuffled])


def test_epochs_and_seeds_differ() -> None:
    orders = [SampleOrder(1000, seed).at(np.arange(3000)).reshape(3, 1000) for seed in (0, 1, 2**40, -1)]
    flat = np.concatenate(orders)
    agreements = [
        int((flat[i] == flat[j]).sum()) for i in range(len(flat)) for j in range(i)
    ]  # two random permutations of any length agree in one place on average
    assert max(agreements) < 10


@pytest.mark.parametrize("num_samples", [3, 10, 37, 256])
def test_each_sample_is_equally_likely_at_each_place(num_samples: int) -> None:
    epochs = 200 * num_samples
    samples = SampleOrder(num_samples, seed=11).at(np.arange(epochs * num_samples))
    places = np.tile(np.arange(num_samples), epochs)
    counts = np.zeros((num_samples, num_samples))
    np.add.at(counts, (places, samples), 1)
    expected = epochs / num_samples
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (num_samples - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours() -> None:
    samples = SampleOrder(100_000, seed=2).at(np.arange(100_000)).astype(np.float64)
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(samples, np.arange(100_000))[0, 1]) < 0.02


def test_the_order_is_part_of_the_format() -> None:
    """A run that resumes with a newer version goes on in the same order."""
    assert SampleOrder(10, seed=0).at(np.arange(10)).tolist() == [9, 1, 3, 6, 2, 4, 8, 0, 7, 5]
    assert counter_hash(7, 1, np.arange(2)).tolist() == [14341046468285645386, 16776958082181307862]


def test_counter_hash_bits_are_balanced_in_every_counter() -> None:
    by_sample = counter_hash(0, 1, 5, np.arange(100_000)) >> np.uint64(63)
    by_epoch = counter_hash(0, 1, np.arange(100_000), 5) >> np.uint64(63)
    for bits in (by_sample, by_epoch, by_sample ^ by_epoch):
        assert 0.49 < float(bits.mean()) < 0.51


def test_an_empty_data_set_has_no_order() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SampleOrder(0, seed=0)


@pytest.mark.parametrize("block_size", [1, 7, 10, 64, 1000])
@pytest.mark.parametrize("num_samples", [1, 9, 10, 103, 1000, 4097])
def test_blocks_cover_every_sample_once_an_epoch(num_samples: int, block_size: int) -> None:
    order = BlockOrder(num_samples, 3, block_size=block_size, window=3 * block_size + 1)
    epochs = order.at(np.arange(3 * num_samples)).reshape(3, num_samples)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(num_samples), (3, 1)))
    some = np.random.default_rng(0).integers(0, 3 * num_samples, 50)
    np.testing.assert_array_equal(order.at(some), epochs.ravel()[some])


def test_a_window_touches_its_blocks_alone_and_names_them_for_reading_ahead() -> None:
    order = BlockOrder(1003, seed=1, block_size=10, window=40)
    samples = order.at(np.arange(2 * 1003))
    read: list[int] = []
    start = 0
    while start < 2 * 1003:
        stop = min(start + 40, (start // 1003 + 1) * 1003)
        assert order.upcoming(start) == order.upcoming(stop - 1)
        window, following = order.upcoming(start)
        assert following == order.upcoming(stop)[0]
        runs = window.runs()
        in_runs = [sample for run in runs for sample in range(*run)]
        assert sorted(samples[start:stop]) == sorted(in_runs)
        assert len(runs) <= 5, "the short block shifts the others: four whole ones and two parts at most"
        read += in_runs
        start = stop
    assert samples.tolist() != read, "shuffled within the windows"
    assert read[:1003] != sorted(read[:1003]), "the blocks come in random order"
    assert samples[:1003].tolist() != samples[1003:].tolist()


def test_orders_that_jump_about_name_no_windows_and_a_mixture_those_of_its_sets() -> None:
    blocks = BlockOrder(100, 0, block_size=10, window=20)
    assert SampleOrder(100, 0).upcoming(30) == balanced()[0].upcoming(30) == []
    mixed = MixedOrder([SampleOrder(100, 0), blocks], [1, 1])
    shifted = [[(start + 100, stop + 100) for start, stop in window.runs()] for window in blocks.upcoming(30)]
    assert [window.runs() for window in mixed.upcoming(60)] == shifted


def test_the_block_order_is_part_of_the_format() -> None:
    order = BlockOrder(11, 0, block_size=2, window=4)
    assert order.at(np.arange(11)).tolist() == [10, 0, 6, 7, 1, 9, 4, 8, 2, 5, 3]


def balanced(seed: int = 0, identities: int = 4, images: int = 3) -> tuple[BalancedOrder, np.ndarray]:
    """10 identities with 1 to 10 images each, shuffled, and three samples that are not to be used."""
    labels = np.repeat(np.arange(-1, 10), [3, *range(1, 11)])
    np.random.default_rng(0).shuffle(labels)
    return BalancedOrder(group_by_identity(labels), seed, identities=identities, images=images), labels


def test_a_balanced_batch_holds_different_identities_with_as_many_images_each() -> None:
    order, labels = balanced()
    samples = order.at(np.arange(200 * 12)).reshape(200, 4, 3)
    found = labels[samples]
    assert (found >= 0).all()
    assert (found == found[:, :, :1]).all()
    assert all(len(set(batch[:, 0])) == 4 for batch in found)
    for group in samples.reshape(-1, 3):
        size = labels[group[0]] + 1
        assert len(set(group)) == min(3, size), "different images, where there are enough"
    turns = np.bincount(found[:, :, 0].ravel(), minlength=10)
    assert turns.min() > 60
    assert turns.max() < 100, "of 80 turns each"
    seen = np.bincount(samples.ravel(), minlength=len(labels))
    for label in range(3, 10):
        of_identity = seen[labels == label]
        assert of_identity.max() < 1.5 * of_identity.mean(), "its images take turns"
    for label in range(2, 10):
        turns_of_cycle = (label + 1) // 3
        for cycle in range(0, 99, turns_of_cycle):  # a round of all identities is two batches
            batches = samples[2 * cycle : 2 * (cycle + turns_of_cycle)]
            drawn = batches[found[2 * cycle : 2 * (cycle + turns_of_cycle)] == label]
            assert len(set(drawn.tolist())) == len(drawn), "no image again before the others had their turn"
    np.testing.assert_array_equal(order.at(np.arange(500, 600)), samples.ravel()[500:600])
    assert (balanced(seed=1)[0].at(np.arange(120)) != samples.ravel()[:120]).any()


def test_a_balanced_order_begins_at_whole_batches_and_replaces_within_the_identity() -> None:
    order, labels = balanced()
    assert order.batch_start(12, 12, drop=False) == 12
    assert order.batch_start(13, 12, drop=True) == 24
    for position in range(120):
        assert labels[order.at(np.asarray([order.substitute(position, 1)]))] == labels[order.at(np.asarray([position]))]
    visits = order.visits(np.arange(240))
    assert len(set(zip(order.at(np.arange(240)).tolist(), visits.tolist(), strict=True))) == 240
    with pytest.raises(UsageError, match="11 identities a batch, but only 10 have images"):
        balanced(identities=11)


def test_a_mixture_gives_each_set_its_share_at_every_place() -> None:
    order = MixedOrder(
        [SampleOrder(100, 0), SampleOrder(1000, 0), BlockOrder(300, 0, block_size=8, window=32)], [3, 1, 0.5]
    )
    assert order.epoch_size == 300 + 1000 + 150
    samples = order.at(np.arange(4 * 1450))
    sets = np.searchsorted([0, 100, 1100], samples, side="right") - 1
    for which, share in enumerate([300, 1000, 150]):
        so_far = np.cumsum(sets == which)
        expected = np.arange(1, 4 * 1450 + 1) * share / 1450
        assert np.abs(so_far - expected).max() <= 2
    times = np.bincount(samples[:2900])
    assert set(times[:100]) == {6}
    assert set(times[100:1100]) == {2}
    assert set(times[1100:]) == {1}, "half of the samples in one epoch, the others in the next"
    np.testing.assert_array_equal(order.at(np.arange(1400, 1500)), samples[1400:1500])
    turns = int((sets[:2000] == 2).sum())
    assert [window.start for window in order.upcoming(2000)] == [turns // 32 * 32, turns // 32 * 32 + 32]


def test_a_picture_has_a_name_of_its_own_in_every_order() -> None:
    orders: list[Order] = [
        SampleOrder(50, 0),
        BlockOrder(50, 0, block_size=8, window=16),
        MixedOrder([SampleOrder(20, 0), SampleOrder(30, 0)], [2, 1]),
    ]
    for order in orders:
        positions = np.arange(4 * order.epoch_size)
        names = set(zip(order.at(positions).tolist(), order.visits(positions).tolist(), strict=True))
        assert len(names) == len(positions)


@pytest.mark.parametrize("drop", [False, True])
def test_batches_are_counted_as_they_come(drop: bool) -> None:
    order = SampleOrder(50, 0)
    for size in (1, 7, 25, 50):
        for first in (0, 7, 33, 49, 50, 64):
            for end in (0, 20, 50, 75, 100, 149, 150):
                count, position = 0, order.batch_start(first, size, drop=drop)
                while position < end:
                    count += 1
                    position = order.batch_start(position + size, size, drop=drop)
                assert order.batches(first, end, size, drop=drop) == count, (size, first, end)


@pytest.mark.parametrize(("samples", "parts", "batch"), [(1000, 2, 8), (1001, 3, 12), (997, 4, 4)])
def test_parts_each_have_their_stretch_of_every_batch(samples: int, parts: int, batch: int) -> None:
    ends = [samples * (part + 1) // parts for part in range(parts)]
    starts = [0, *ends[:-1]]
    orders = [
        BlockOrder(end - start, 5 + part, block_size=16, window=64)
        for part, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    order = PartedOrder(orders, batch)
    assert (order.num_samples, order.epoch_size) == (samples, samples)
    batches = 3 * samples // batch
    positions = np.arange(batches * batch)
    found = order.at(positions).reshape(batches, parts, batch // parts)
    visits = order.visits(positions).reshape(found.shape)
    for part, (start, end) in enumerate(zip(starts, ends, strict=True)):
        own = found[:, part].ravel()
        assert own.min() >= start
        assert own.max() < end
        for visit in range(len(own) // (end - start)):  # each sample once in each of the part's epochs
            epoch = own[visit * (end - start) : (visit + 1) * (end - start)]
            assert np.array_equal(np.sort(epoch), np.arange(start, end))
            assert (visits[:, part].ravel()[visit * (end - start) : (visit + 1) * (end - start)] == visit).all()
    # Read one by one, or from the middle, it is the same.
    assert [int(order.at(np.array([p]))[0]) for p in range(40)] == found.ravel()[:40].tolist()


def test_the_windows_of_a_part_are_those_of_its_own_samples() -> None:
    orders = [BlockOrder(500, part, block_size=16, window=64) for part in range(2)]
    order = PartedOrder(orders, 8)
    for position in (0, 3, 4, 7, 1604, 1600):
        part = position % 8 // 4
        read = set(order.at(np.arange(position, position + 8 * 8).reshape(8, 8)[:, :1].ravel()).tolist())
        covered = {
            sample
            for window in order.upcoming(position)
            for start, stop in window.runs()
            for sample in range(start, stop)
        }
        assert read <= covered
        assert all(500 * part <= sample < 500 * (part + 1) for sample in covered)
