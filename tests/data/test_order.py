"""SampleOrder: every epoch covers each sample once, in an order that depends on (seed, epoch) alone."""

import numpy as np
import pytest

from pfc.data.order import SampleOrder, counter_hash

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
