import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfc.engine.schedule import learning_rate_factor, sample_rate_at

runs = st.integers(1, 300).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(0, steps)))
names = st.sampled_from(["polynomial", "cosine", "constant"])
finals = st.floats(0, 1)


def factors(steps, warmup_steps, name, **options):
    return [learning_rate_factor(s, steps=steps, warmup_steps=warmup_steps, name=name, **options) for s in range(steps)]


@given(runs, names, st.floats(0.5, 4), finals)
def test_rises_through_the_warmup_and_never_after_it(run, name, power, final):
    steps, warmup_steps = run
    values = factors(steps, warmup_steps, name, power=power, final=final)
    assert all(0 <= value <= 1 for value in values)
    rise, fall = values[:warmup_steps], values[warmup_steps:]
    assert rise == [(s + 1) / warmup_steps for s in range(warmup_steps)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(fall))
    assert all(value >= final - 1e-12 for value in fall)
    if fall:
        assert fall[0] == 1.0


@given(st.integers(0, 50), st.sampled_from(["polynomial", "cosine"]), finals)
def test_ends_near_final_and_is_final_after_the_last_step(warmup_steps, name, final):
    steps = warmup_steps + 200
    last = learning_rate_factor(steps - 1, steps=steps, warmup_steps=warmup_steps, name=name, final=final)
    assert last == pytest.approx(final, abs=1e-3)
    after = learning_rate_factor(steps, steps=steps, warmup_steps=warmup_steps, name=name, final=final)
    assert after == pytest.approx(final)


def test_values_in_the_middle_of_the_decay():
    middle = {"steps": 110, "warmup_steps": 10}
    assert learning_rate_factor(60, name="polynomial", power=2.0, **middle) == pytest.approx(0.25)
    assert learning_rate_factor(60, name="polynomial", power=1.0, final=0.2, **middle) == pytest.approx(0.6)
    assert learning_rate_factor(60, name="cosine", **middle) == pytest.approx(0.5)
    assert learning_rate_factor(35, name="cosine", **middle) == pytest.approx(0.8535534)
    assert learning_rate_factor(60, name="constant", **middle) == 1.0


def test_drives_a_torch_optimizer_through_lambda_lr():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps=6, warmup_steps=2, name="polynomial", power=1.0)
    )
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.3, 0.2, 0.1])


def test_the_sample_rate_rises_with_the_run():
    later = [[0.5, 0.3], [0.9, 1.0]]
    rates = [sample_rate_at(share, 0.1, later) for share in (0.0, 0.49, 0.5, 0.89, 0.9, 0.999)]
    assert rates == [0.1, 0.1, 0.3, 0.3, 1.0, 1.0]
    assert sample_rate_at(0.7, 0.1, []) == 0.1
