"""The bootstrap over identities, against how far a figure really scatters."""

import numpy as np
import pytest

from pfc.engine.evaluation.intervals import over_identities
from tests.ranks import run_ranks


def sample_of(generator, identities=150, each=6):
    """Items whose values have a part that their identity shares: a mean, and the identities."""
    ids = np.repeat(np.arange(identities), each)
    return ids, 0.3 + generator.normal(0, 0.2, identities)[ids] + generator.normal(0, 0.1, len(ids))


def mean_of(values):
    return lambda weights: {"mean": float(values @ weights / weights.sum())}


@pytest.mark.parametrize("sides", [1, 2])
def test_an_interval_is_as_wide_as_the_figure_scatters(sides):
    """Of items, and of pairs whose two sides are one identity: which is drawn once, not squared."""
    generator = np.random.default_rng(0)
    means, widths = [], []
    for repeat in range(200):
        ids, values = sample_of(generator)
        means.append(values.mean())
        if repeat < 8:
            low, high = over_identities([ids] * sides, mean_of(values))["mean"]
            widths.append(high - low)
    low, high = np.percentile(means, [2.5, 97.5])
    assert np.mean(widths) == pytest.approx(high - low, rel=0.2)


def test_the_unknown_are_identities_of_their_own():
    """Weights of a pair of two unknown are products of two draws, and never those of a known identity's."""
    seen = []
    over_identities([np.array([5, -1]), np.array([-1, 6])], lambda weights: seen.append(weights) or {}, samples=200)
    weights = np.array(seen)
    assert weights.max() > 1
    assert np.corrcoef(weights.T)[0, 1] < 0.3
    assert len({tuple(one) for one in weights}) > 4


def test_every_draw_is_told():
    """So that a watchdog does not take a long bootstrap for a hang."""
    told = []
    over_identities([np.arange(5)], mean_of(np.arange(5.0)), samples=17, moved=lambda: told.append(1))
    assert len(told) == 17


def on_a_rank():
    ids, values = sample_of(np.random.default_rng(1))
    return over_identities([ids], mean_of(values), samples=25)


def test_ranks_share_the_draws():
    for one in run_ranks(3, on_a_rank):
        assert one == on_a_rank()
