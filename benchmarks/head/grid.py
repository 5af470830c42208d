"""The head's benchmark: every combination of the options, with its baselines, in rounds."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ...data.errors import UsageError
from ...partial_fc import objectives
from ..ceilings import DTYPES, Ceilings, measure_ceilings
from ..ranks import RankDied
from .case import HeadCase, Line
from .measure import measure
from .memory import why_not

Progress = Callable[[int, int, str], None]
"""Called with (measurements done, of how many, what is measured now)."""


@dataclass(frozen=True)
class HeadGrid:
    """What is measured. Tuples are all combined with each other.

    Attributes:
        sampled: numbers of classes sampled each step, over all ranks, in place of rates: rate = sampled / classes.
        threads: of each rank, on a CPU.
        steps: timed steps of a line and round.
        warmup: untimed steps before them.
        rounds: how often all lines are measured, one after the other, so that drifts of the machine's speed
            affect all of them alike.
        dense: whether the dense head is measured too.
        peer: folder of the common implementation's head, measured too; none when empty.
    """

    classes: tuple[int, ...] = (100_000,)
    rate: tuple[float, ...] = (1.0, 0.1)
    sampled: tuple[int, ...] = ()
    batch: tuple[int, ...] = (128,)
    dim: tuple[int, ...] = (512,)
    ranks: tuple[int, ...] = (2,)
    precision: tuple[str, ...] = ("float32",)
    objective: tuple[str, ...] = ("cosface",)
    threads: int = 1
    steps: int = 5
    warmup: int = 2
    rounds: int = 2
    dense: bool = True
    peer: str = ""

    def checked(self) -> "HeadGrid":
        """The same, if it can be measured at all.

        Raises:
            UsageError: a value is out of range, or our own head would not fit into memory.
        """
        self.check_values()
        for line in self.lines():
            if line.case.head == "pfc" and (reason := why_not(line.case)):
                raise UsageError(reason)
        return self

    def check_values(self) -> None:
        """
        Raises:
            UsageError: a value is out of range.
        """
        for name in ("classes", "sampled", "batch", "dim", "ranks", "threads", "steps", "rounds"):
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value < 1:
                    raise UsageError(f"--{name} {value}: must be at least 1")
        for size, ranks in product(self.batch, self.ranks):
            if size % ranks:
                raise UsageError(f"--batch {size} does not divide into {ranks} ranks")
        for rate in self.rate:
            if not 0 < rate <= 1:
                raise UsageError(f"--rate {rate}: must lie in (0, 1]")
        for sampled in self.sampled:
            if sampled > min(self.classes):
                raise UsageError(f"--sampled {sampled}: more than --classes {min(self.classes)}")
        for name in self.precision:
            if name not in DTYPES:
                raise UsageError(f"--precision {name}: {' or '.join(DTYPES)}")
        for name in self.objective:
            if name not in objectives.names():
                raise UsageError(f"--objective {name}: not one of {', '.join(objectives.names())}")
        if self.peer and not (Path(self.peer) / "partial_fc_v2.py").is_file():
            raise UsageError(f"--peer {self.peer}: no partial_fc_v2.py there; give the folder that holds it")

    def lines(self) -> list[Line]:
        """One for each combination, the baselines before ours, each baseline once."""
        lines: dict[HeadCase, Line] = {}
        for ranks, batch, dim, classes in product(self.ranks, self.batch, self.dim, self.classes):
            rates = tuple(count / classes for count in self.sampled) or self.rate
            for precision, rate, objective in product(self.precision, rates, self.objective):
                dense = peer = None
                if self.dense:
                    case = HeadCase("dense", classes, dim, batch, 1.0, ranks, precision)
                    dense = lines.setdefault(case, Line(case))
                if self.peer:  # its own training takes float32 products, and on a CPU it has no others
                    folder = str(Path(self.peer).resolve())
                    case = HeadCase("peer", classes, dim, batch, rate, ranks, "float32", peer=folder)
                    peer = lines.setdefault(case, Line(case))
                case = HeadCase("pfc", classes, dim, batch, rate, ranks, precision, objective)
                lines[case] = Line(case, dense=dense, peer=peer)
        return list(lines.values())


@dataclass(frozen=True)
class HeadResults:
    """What was measured, and on what."""

    grid: HeadGrid
    ceilings: list[Ceilings]
    lines: list[Line]

    def to_dict(self) -> dict[str, Any]:
        grid = self.grid
        return {
            **machine(),
            "threads": grid.threads,
            "steps": grid.steps,
            "warmup": grid.warmup,
            "rounds": grid.rounds,
            "ceilings": [ceilings.to_dict() for ceilings in self.ceilings],
            "lines": [line.to_dict() for line in self.lines],
        }


def machine() -> dict[str, str]:
    """What the figures are of."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "device": device}


def measure_grid(grid: HeadGrid, progress: Progress) -> HeadResults:
    """Measures all lines and, before and after those of a number of ranks, the machine.

    A line that fails, or a baseline that does not fit into memory, has its ``error`` set and leaves the others alone.

    Raises:
        UsageError: see ``HeadGrid.checked``.
        RankDied: the machine's ceilings could not be measured.
    """
    lines = grid.checked().lines()
    pace = Pace(grid.threads, grid.steps, grid.warmup, grid.rounds)
    return HeadResults(grid, measure_lines(lines, pace, progress), lines)


@dataclass(frozen=True)
class Pace:
    """How lines are measured: see ``HeadGrid``.

    Attributes:
        profiled: steps after the timed ones.
        memory: the limit of ``why_not``.
    """

    threads: int
    steps: int
    warmup: int
    rounds: int
    profiled: int = 2
    memory: int | None = None


def measure_lines(lines: list[Line], pace: Pace, progress: Progress) -> list[Ceilings]:
    """``measure_grid`` of given lines, into them; returns the ceilings of each number of processes.

    Raises:
        RankDied: the machine's ceilings could not be measured.
    """
    processes = dict.fromkeys(line.case.processes for line in lines)
    total, done = len(lines) * pace.rounds + 2 * len(processes), 0
    precisions = sorted({line.case.precision for line in lines})
    every = []

    def next_is(what: str) -> None:
        nonlocal done
        progress(done, total, what)
        done += 1

    for count in processes:
        mine = [line for line in lines if line.case.processes == count]
        best: Ceilings | None = None
        for when in ("before", "after"):
            next_is(f"the machine with {count} process(es)")
            best = measure_ceilings(count, threads=pace.threads, precisions=precisions).best(best)
            if when == "before":
                for _ in range(pace.rounds):
                    for line in mine:
                        next_is(str(line.case))
                        _measure_round(line, pace)
        for line in mine:
            line.ceilings = best
        every.append(best)
    progress(total, total, "done")
    return every


def _measure_round(line: Line, pace: Pace) -> None:
    if line.error:
        return
    line.error = why_not(line.case, pace.memory)
    if not line.error:
        try:
            line.rounds.append(
                measure(
                    line.case, steps=pace.steps, warmup=pace.warmup, threads=pace.threads, profiled_steps=pace.profiled
                )
            )
        except RankDied as died:
            line.error, line.died = f"{line.case}: {died}", True
            line.rounds.clear()
