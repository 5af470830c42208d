"""Times whole steps of one head (forward, backward, row update), and then profiles a few more."""

from typing import Any

import torch
from torch import Tensor

from ..ranks import Rank, run
from .case import HeadCase, Measurement
from .heads import build
from .phases import profiled

_PROFILED = 2
"""Steps that are profiled, after the timed ones."""


def measure(case: HeadCase, *, steps: int, warmup: int, threads: int) -> Measurement:
    """Runs one case in processes of its own, so that its peak memory is its own.

    Args:
        steps: timed steps; warmup: untimed ones before.
        threads: torch's threads per rank, on a CPU.

    Raises:
        RankDied: a rank did not come to the end.
    """
    results = run(_measure, case.ranks, threads, case, steps, warmup)
    seconds = torch.tensor([result["seconds"] for result in results]).amax(dim=0).tolist()
    return Measurement(seconds, max(result["peak"] for result in results), results[0]["phases"])


def _measure(rank: Rank, case: HeadCase, steps: int, warmup: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rank.number)
    size = case.batch // rank.size

    def batch() -> tuple[Tensor, Tensor]:
        embeddings = torch.randn(size, case.dim, generator=generator).to(rank.device).requires_grad_()
        return embeddings, torch.randint(0, case.classes, (size,), generator=generator).to(rank.device)

    before = rank.reset_peak()
    head = build(case, rank.device)
    seconds = rank.time_steps(head.step, steps, warmup, prepare=batch)
    peak = rank.peak() - before
    return {"seconds": seconds, "peak": peak, "phases": profiled(head, rank, batch, _PROFILED)}
