"""Times whole steps of one head (forward, backward, row update), and then profiles a few more."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..ranks import OwnMemory, Rank, run
from .case import HeadCase, Measurement
from .heads import build
from .phases import profiled


def measure(case: HeadCase, *, steps: int, warmup: int, threads: int, profiled_steps: int = 2) -> Measurement:
    """Runs one case in processes of its own, so that its peak memory is its own.

    Args:
        steps: timed steps; warmup: untimed ones before.
        threads: torch's threads per rank, on a CPU.
        profiled_steps: after the timed ones.

    Raises:
        RankDied: a rank did not come to the end.
    """
    world_size = case.ranks if case.simulated else 0
    results = run(_measure, case.processes, threads, case, steps, warmup, profiled_steps, world_size=world_size)
    seconds = torch.tensor([result["seconds"] for result in results]).amax(dim=0).tolist()
    peak, used = (max(result[name] for result in results) for name in ("peak", "used"))
    return Measurement(seconds, peak, results[0]["phases"], used or None)


def _measure(rank: Rank, case: HeadCase, steps: int, warmup: int, profiled_steps: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rank.number)
    size = case.batch // case.ranks

    def batch() -> tuple[Tensor, Tensor]:
        embeddings = torch.randn(size, case.dim, generator=generator).to(rank.device).requires_grad_()
        return embeddings, torch.randint(0, case.classes, (size,), generator=generator).to(rank.device)

    before = rank.reset_peak()
    mapped = case.storage == "file" and rank.device.type == "cpu"
    with OwnMemory() if mapped else nullcontext() as own:
        head = build(case, rank.device)
        seconds = rank.time_steps(head.step, steps, warmup, prepare=batch)
    peak = rank.peak() - before if own is None else own.peak
    phases = profiled(head, rank, batch, profiled_steps) if profiled_steps else {}
    return {"seconds": seconds, "peak": peak, "phases": phases, "used": head.used_rows}
