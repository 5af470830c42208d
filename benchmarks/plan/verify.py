"""What is predicted for real steps, and what is measured."""

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...engine import build
from ...engine.config import Config, parse_config
from ...engine.plan.backbone import dry_run
from ...engine.plan.limits import Plan
from ...engine.plan.machine import Machine
from ...engine.plan.memory import head_memory
from ...engine.plan.setup import Setup
from ...engine.plan.timing import head_phases
from ...engine.plan.traffic import transfer
from ..ranks import OwnMemory, Rank, run
from .cases import BATCH, CASES, Case, head_steps, whole_steps
from .here import machine_here

_MEMORY, _TIME = 0.1, 2.0
"""How far a prediction may be off: a share of the memory, a factor of the time."""
_STEPS = 6


@dataclass(frozen=True)
class Check:
    """One prediction and its measurement.

    Attributes:
        memory, measured_memory: bytes of the rank that takes most, beyond the process itself; not a mapped file's.
        seconds, measured_seconds: of a step on the slowest rank, the median; as ``Steps.time`` has them.
        clock_seconds: the same by the clock.
    """

    case: Case
    measured_memory: float
    measured_seconds: float
    clock_seconds: float
    memory: float
    seconds: float

    @property
    def memory_ratio(self) -> float:
        """Predicted by measured."""
        return self.memory / self.measured_memory

    @property
    def time_ratio(self) -> float:
        """Predicted by measured."""
        return self.seconds / self.measured_seconds

    @property
    def good(self) -> bool:
        return abs(self.memory_ratio - 1) <= _MEMORY and 1 / _TIME <= self.time_ratio <= _TIME

    def to_dict(self) -> dict[str, Any]:
        return {
            "case": str(self.case),
            "ranks": self.case.ranks,
            "predicted_bytes": self.memory,
            "measured_bytes": self.measured_memory,
            "memory_ratio": self.memory_ratio,
            "predicted_s": self.seconds,
            "measured_s": self.measured_seconds,
            "clock_s": self.clock_seconds,
            "time_ratio": self.time_ratio,
            "good": self.good,
        }


def verify(tell: Callable[[int, int, str], None], threads: int = 1) -> Iterator[Check]:
    """Predicts and measures every case, each in processes of its own.

    Args:
        tell: called with (done, of how many, what is measured now).

    Raises:
        RankDied: a rank ended before it was done.
    """
    last: tuple[tuple[int, int], Machine] | None = None
    for done, case in enumerate(CASES):
        tell(done, len(CASES), str(case))
        key = case.ranks, case.config.backbone.embedding_dim
        # The machine's speed changes with what else it does: its ceilings are the mean of before and after.
        before = last[1] if last is not None and last[0] == key else machine_here(*key, threads)
        with tempfile.TemporaryDirectory(prefix="pfc-plan-") as folder:
            results = run(_measured, case.ranks, threads, case.config.model_dump(), case.whole, folder)
        after = machine_here(*key, threads)
        last = key, after
        peak = max(result["peak"] for result in results)
        clock, own = (
            torch.tensor([result[name] for result in results]).amax(dim=0).median().item() for name in ("clock", "own")
        )
        yield Check(case, peak, own, clock, *_predicted(case, before.mean(after)))


def _predicted(case: Case, machine: Machine) -> tuple[float, float]:
    """Bytes of a rank beyond the process itself, and seconds of a step."""
    setup = Setup.of(case.config, case.ranks)
    if case.whole:
        plan = Plan(setup, machine, dry_run(case.config, build.input_size(case.config)))
        parts = [part for part in plan.memory.parts if part.name not in ("process", "images")]
        return sum(part.device + part.host for part in parts) + plan.backbone.images, plan.time.seconds
    memory = head_memory(setup, machine)
    mapped = memory.centers + memory.state if setup.storage == "file" else 0
    moved = transfer(setup, machine, 0.0).seconds
    walks = sum(phase.seconds for phase in head_phases(setup, machine))
    return memory.peak - mapped, walks + moved + machine.overhead


def _measured(rank: Rank, tree: dict[str, Any], whole: bool, folder: str) -> dict[str, Any]:
    """Peak memory and seconds of every step. What the first step of all loads is not counted: a small one is first."""
    of = whole_steps if whole else head_steps
    config = parse_config(tree)
    if config.head.storage == "file":
        config = _with_head(config, storage_dir=folder)
    small = config.model_copy(update={"data": config.data.model_copy(update={"batch_size": 2})})
    of(rank, _with_head(small, num_classes=8 * BATCH)).time(rank, steps=2)
    if rank.device.type == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed, or the large one would find it there
    before = rank.reset_peak()
    with OwnMemory() as memory:
        clock, own = of(rank, config).time(rank, _STEPS)
    peak = memory.peak if rank.device.type == "cpu" else rank.peak() - before
    return {"clock": clock, "own": own, "peak": peak}


def _with_head(config: Config, **keys: Any) -> Config:
    return config.model_copy(update={"head": config.head.model_copy(update=keys)})
