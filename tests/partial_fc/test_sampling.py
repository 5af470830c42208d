import math

import pytest
import torch

from pfc.partial_fc.centers import ClassShard
from pfc.partial_fc.permutation import permute
from pfc.partial_fc.sampling import sample_batch, sample_classes

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 31, 64, 100, 1000, 4096])
def test_permute_is_a_permutation_for_every_key(size: int) -> None:
    for key in range(20):
        permuted = permute(torch.arange(size), size, torch.tensor(key))
        assert torch.equal(permuted.sort().values, torch.arange(size))


def test_permutations_of_different_keys_differ() -> None:
    first, second = (permute(torch.arange(1000), 1000, torch.tensor(key)) for key in (1, 2))
    assert (first == second).float().mean() < 0.02


@pytest.mark.parametrize("num_classes", [1, 2, 3, 100, 4096, 4097, 9001, 20000])
@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3, 0.999, 1.0])
def test_the_shards_samples_together_are_the_sample_of_one(num_classes: int, rate: float) -> None:
    labels = torch.tensor([0, num_classes - 1, num_classes // 2, 0])
    for step in range(3):
        whole = _classes(labels, num_classes, 0, 1, rate, step)
        for world_size in (2, 3, 7):
            parts = [_classes(labels, num_classes, rank, world_size, rate, step) for rank in range(world_size)]
            assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(whole, whole.unique())
        assert torch.isin(labels, whole).all()
        assert abs(len(whole) - rate * num_classes) <= len(labels) + 1


def _classes(
    labels: torch.Tensor, num_classes: int, rank: int, world_size: int, rate: float, step: int
) -> torch.Tensor:
    shard = ClassShard.of(num_classes, rank, world_size)
    sample = sample_classes(labels, shard, rate=rate, seed=5, step=step)
    mine = (labels >= shard.start) & (labels < shard.stop)
    assert torch.equal(sample.columns >= 0, mine)
    assert torch.equal(sample.classes[sample.columns[mine]], labels[mine])
    if sample.rows is not None:
        assert torch.equal(sample.rows + shard.start, sample.classes)
    return sample.classes


@pytest.mark.parametrize(("num_classes", "rate"), [(300, 0.1), (5000, 0.03), (8200, 0.01)])
def test_every_class_is_equally_likely(num_classes: int, rate: float) -> None:
    """Counts over many steps against the binomial distribution; a fair sampler fails once in 10⁵ seeds.

    Sums of squared deviations, in units of the variance, are χ²(C) (the sample of a step has a fixed size, which takes
    one degree of freedom a block, nothing against C); by its normal approximation 4.4 σ is one in 10⁵.
    """
    steps = 1000
    nobody = torch.empty(0, dtype=torch.int64)
    shard = ClassShard.of(num_classes, 0, 1)
    counts = torch.zeros(num_classes, dtype=torch.float64)
    for step in range(steps):
        counts[sample_classes(nobody, shard, rate=rate, seed=1, step=step).classes] += 1
    variance = steps * rate * (1 - rate)
    deviation = float(((counts - steps * rate) ** 2 / variance).sum())
    assert abs(deviation - num_classes) < 4.4 * math.sqrt(2 * num_classes)
    # The last, shorter block is as likely as the others (its mean, at 4.4 σ).
    last = counts[num_classes // 4096 * 4096 :]
    assert abs(float(last.mean()) - steps * rate) < 4.4 * math.sqrt(variance / len(last)) + 1e-9


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 11, 16])
def test_permutations_of_few_values_are_even(size: int) -> None:
    """Each value at each place equally often over 100,000 keys (5 σ for each of at most 256: once in 7,000 seeds)."""
    draws = 100_000
    keys = torch.randint(0, 2**32, (draws, 1), generator=torch.Generator().manual_seed(1))
    places = permute(torch.arange(size).expand(draws, -1), size, keys)
    counts = torch.nn.functional.one_hot(places, size).sum(dim=0).double()
    expected = draws / size
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected * (1 - 1 / size))


def test_pairs_of_classes_are_drawn_independently() -> None:
    """Two classes of a small block, where the permutation is weakest, meet as often as in draws without replacement.

    The mean of 2016 squared deviations lies in 1 ± 0.14 but for one key in 10⁵ (4.4 σ), their largest below 5.5 σ.
    """
    size, take, draws = 64, 16, 20_000
    keys = torch.randint(0, 2**32, (draws, 1), generator=torch.Generator().manual_seed(0))
    places = permute(torch.arange(take).expand(draws, -1), size, keys)
    chosen = torch.zeros(draws, size, dtype=torch.float64).scatter_(1, places, 1.0)
    together = (chosen.T @ chosen)[~torch.eye(size, dtype=torch.bool)]
    probability = take * (take - 1) / (size * (size - 1))
    deviation = (together - draws * probability) / math.sqrt(draws * probability * (1 - probability))
    assert abs(float(deviation.square().mean()) - 1) < 0.14
    assert deviation.abs().max() < 5.5


@pytest.mark.parametrize(
    ("size", "rate", "count"), [(10, 0.5, 5), (10, 0.51, 6), (30, 0.1, 3), (1, 0.001, 1), (7, 0.999, 7)]
)
def test_a_batch_sample_has_its_size_rounded_up(size: int, rate: float, count: int) -> None:
    chosen = sample_batch(size, rate=rate, seed=0, step=0, device=CPU)
    assert chosen is not None
    assert len(chosen.unique()) == len(chosen) == count
    assert chosen.min() >= 0
    assert chosen.max() < size


def test_every_place_of_the_batch_is_equally_likely() -> None:
    """At 4.4 σ for each of 20 places: a fair sampler fails once in 5000 seeds."""
    counts = torch.zeros(20)
    for step in range(3000):
        chosen = sample_batch(20, rate=0.25, seed=3, step=step, device=CPU)
        assert chosen is not None
        counts[chosen] += 1
    assert (counts - 750).abs().max() < 4.4 * math.sqrt(3000 * 0.25 * 0.75)


def test_cost_follows_the_sample_not_the_shard() -> None:
    """The largest tensor of a draw at rate 10⁻³ stays far below the number of classes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    num_classes = 4_000_000
    shard = ClassShard.of(num_classes, 0, 1)
    with Watch():
        sample = sample_classes(torch.arange(100), shard, rate=1e-3, seed=0, step=0)
    assert 3900 <= len(sample.classes) <= 4200
    assert largest < 4 * len(sample.classes)
