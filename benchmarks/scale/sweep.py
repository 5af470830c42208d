"""What ``pfc bench scale`` measures: heads of more and more classes, until they no longer fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ...data.errors import UsageError
from ...partial_fc.storage import PLACES
from ..ceilings import Ceilings
from ..head.case import ITEM, Line
from ..head.grid import HeadGrid, Pace, Progress, machine, measure_lines
from ..head.memory import bytes_free, bytes_needed

OPTIMIZERS = ("row_sgd", "row_adagrad")


@dataclass(frozen=True)
class Sweep:
    """What is measured. Tuples are all combined with each other.

    Attributes:
        classes: C.
        rate: sample rates.
        rows: numbers of classes sampled each step, over all ranks, in place of rates: rate = rows / classes.
        ranks: processes.
        simulate: sizes of worlds of which one rank is measured, the first; the others do not exist.
        storage, storage_dir, center_dtype, optimizer: see ``HeadCase``.
        dim: D.
        batch: samples of a rank in a step; ranks times that are the global batch.
        precision, objective: see ``HeadCase``.
        threads, steps, warmup, rounds, dense, peer: see ``HeadGrid``; the baselines are not measured in simulated
            worlds.
        memory: GiB that all processes of a line together may take; all that is free when None.
    """

    classes: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    rate: tuple[float, ...] = (0.1,)
    rows: tuple[int, ...] = ()
    ranks: tuple[int, ...] = (2,)
    simulate: tuple[int, ...] = ()
    storage: tuple[str, ...] = ("device",)
    storage_dir: str = "."
    center_dtype: tuple[str, ...] = ("float32",)
    optimizer: str = "row_sgd"
    dim: int = 512
    batch: int = 64
    precision: str = "float32"
    objective: str = "cosface"
    threads: int = 1
    steps: int = 3
    warmup: int = 1
    rounds: int = 2
    dense: bool = True
    peer: str = ""
    memory: float | None = None

    def check(self) -> None:
        """
        Raises:
            UsageError: a value is out of range.
        """
        for name, allowed in (("storage", PLACES), ("center_dtype", tuple(ITEM)), ("optimizer", OPTIMIZERS)):
            values = getattr(self, name)
            for value in (values,) if isinstance(values, str) else values:
                if value not in allowed:
                    raise UsageError(f"--{name.replace('_', '-')} {value}: {' or '.join(allowed)}")
        for size in self.simulate:
            if size < 2:
                raise UsageError(f"--simulate {size}: must be at least 2; one rank needs no simulation")
        for rows in self.rows:
            if rows > min(self.classes):
                raise UsageError(f"--rows {rows}: more than --classes {min(self.classes)}")
        for _, grid in self._worlds():
            grid.check_values()

    def lines(self) -> list[Line]:
        """One for each combination, each baseline once; simulated worlds last."""
        lines = []
        for simulated, grid in self._worlds():
            for line in grid.lines():
                if line.case.head != "pfc":
                    lines.append(line)
                    continue
                case = replace(line.case, storage_dir=self.storage_dir, optimizer=self.optimizer, simulated=simulated)
                for storage, dtype in product(self.storage, self.center_dtype):
                    lines.append(replace(line, case=replace(case, storage=storage, center_dtype=dtype), rounds=[]))
        return lines

    def _worlds(self) -> Iterator[tuple[bool, HeadGrid]]:
        """Of each number of ranks whether it is simulated, and its cases."""
        for simulated, sizes in ((False, self.ranks), (True, self.simulate)):
            for size in sizes:
                yield (
                    simulated,
                    HeadGrid(
                        classes=self.classes,
                        rate=self.rate,
                        sampled=self.rows,
                        batch=(size * self.batch,),
                        dim=(self.dim,),
                        ranks=(size,),
                        precision=(self.precision,),
                        objective=(self.objective,),
                        threads=self.threads,
                        steps=self.steps,
                        rounds=self.rounds,
                        dense=self.dense and not simulated,
                        peer="" if simulated else self.peer,
                    ),
                )


@dataclass(frozen=True)
class ScaleResults:
    """What was measured, and on what.

    Attributes:
        free: bytes that the processes of a line could take together, before the first.
    """

    sweep: Sweep
    free: int
    ceilings: list[Ceilings]
    lines: list[Line]

    def to_dict(self) -> dict[str, Any]:
        sweep = self.sweep
        return {
            **machine(),
            "threads": sweep.threads,
            "steps": sweep.steps,
            "warmup": sweep.warmup,
            "rounds": sweep.rounds,
            "free_bytes": self.free,
            "ceilings": [ceilings.to_dict() for ceilings in self.ceilings],
            "lines": [
                {
                    **line.to_dict(),
                    "stored_rows": line.case.stored_rows,
                    "exchanged_bytes": line.case.exchanged_bytes,
                    "needed_bytes": bytes_needed(line.case),
                    "samples_per_s": line.case.batch / line.fastest if line.rounds else None,
                }
                for line in self.lines
            ],
        }


def measure_sweep(sweep: Sweep, progress: Progress) -> ScaleResults:
    """Measures all lines; one that does not fit into memory, or dies, has its ``error`` set.

    Raises:
        UsageError: see ``Sweep.check``.
        RankDied: the machine's ceilings could not be measured.
    """
    sweep.check()
    lines = sweep.lines()
    limit = None if sweep.memory is None else int(sweep.memory * 2**30)
    free = bytes_free() if limit is None else min(limit, bytes_free())
    pace = Pace(sweep.threads, sweep.steps, sweep.warmup, sweep.rounds, profiled=0, memory=limit)
    return ScaleResults(sweep, free, measure_lines(lines, pace, progress), lines)
