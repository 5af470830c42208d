"""What changes as a run goes on: the learning rate (linear warm-up, then a decay) and the sample rate."""

import math
from collections.abc import Sequence
from typing import Literal, assert_never

ScheduleName = Literal["polynomial", "cosine", "constant"]


def learning_rate_factor(
    step: int, *, steps: int, warmup_steps: int, name: ScheduleName, power: float = 2.0, final: float = 0.0
) -> float:
    """What the base learning rate is multiplied by in step ``step``; for ``LambdaLR`` of every optimizer alike.

    Warm-up: (step+1)/warmup_steps, so that the first step learns a little and the last warm-up step fully. After it,
    with t = (step − warmup_steps)/(steps − warmup_steps), which is 0 in the first step of the decay and would be 1 in
    the step after the last:

        polynomial   final + (1 − final)·(1 − t)^power
        cosine       final + (1 − final)·(1 + cos πt)/2
        constant     1

    Args:
        step: number of the step, from 0.
        steps: steps of the whole run.
        warmup_steps: how many of them belong to the warm-up; 0 for none.
        power: exponent of the polynomial.
        final: the factor at which the decay ends, in [0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    t = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    match name:
        case "polynomial":
            decay = (1.0 - t) ** power
        case "cosine":
            decay = 0.5 * (1.0 + math.cos(math.pi * t))
        case "constant":
            return 1.0
        case _:
            assert_never(name)
    return final + (1.0 - final) * decay


def sample_rate_at(share: float, first: float, later: Sequence[Sequence[float]]) -> float:
    """The rate at which classes are sampled after ``share`` (0 to 1) of the run.

    Args:
        first: the rate of the beginning.
        later: pairs [share, rate], shares rising: from that share of the run on, that rate.
    """
    return next((rate for begin, rate in reversed(later) if share >= begin), first)
