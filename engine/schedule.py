"""What changes as a run goes on: the learning rate (linear warm-up, then a decay) and the sample rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, assert_never

if TYPE_CHECKING:
    from .build import Parts
    from .config import Config

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


def set_rates(config: Config, parts: Parts, step: int, total_steps: int) -> float:
    """Sets the learning rates of both optimizers and the head's sample rate for the step of this number, from 0.

    Returns:
        the backbone's learning rate.
    """
    schedule, optimizers, head = config.schedule, config.optimizer, config.head
    factor = learning_rate_factor(
        step,
        steps=total_steps,
        warmup_steps=schedule.warmup_steps,
        name=schedule.name,
        power=schedule.power,
        final=schedule.final,
    )
    for optimizer, peak in (
        (parts.backbone_optimizer, optimizers.backbone.lr),
        (parts.head_optimizer, optimizers.head.lr),
    ):
        for group in optimizer.param_groups:
            group["lr"] = peak * factor * group.get("share", 1.0)
    parts.head.sample_rate = sample_rate_at(step / total_steps, head.sample_rate, head.sample_rate_schedule)
    return optimizers.backbone.lr * factor
