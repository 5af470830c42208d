"""What one line of the head's benchmark measures, what a step of it must do, and what came of it.

What a step must do: operations and bytes, and the time that they take at the machine's ceilings.
B global batch, D dimension, K rows used on this rank; per rank and step. The rows are read once for the loss. The row
update reads and writes them and SGD's momentum: 5·K·D numbers in the centers' precision, 3·K·D with Adagrad. The
products are three (cosines, embeddings' gradient, rows' gradient), 6·B·K·D operations; the third needs the
probabilities again, which are either stored, B·K numbers of the products' precision written and read, or recomputed,
2·B·K·D operations. P2SGrad may take the Gram matrix in place of the cosines: 4·K·D² + 4·B·D² operations, and nothing
stored.

Not counted: exponentials, the exchange between the ranks, the sample, and all that is done to numbers in the cache.
"""

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from ...partial_fc.sampling import expected_rows
from ..ceilings import Ceilings

ITEM = {"float32": 4, "bf16": 2}
"""Bytes of a number in a precision."""


@dataclass(frozen=True)
class Way:
    """One way of doing the step: floating-point operations of the products, and bytes to and from memory."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """What a step needs.

    Attributes:
        rows: K, the expected number of rows that the rank uses.
        ways: the ways to do it; the first is the one with three products and stored probabilities.
    """

    rows: float
    ways: tuple[Way, ...]

    def floor(self, ceilings: Ceilings, precision: str) -> float:
        """Seconds of the cheapest way: operations at the products' rate, bytes at the memory's, nothing overlapped."""
        rate = ceilings.products[precision]
        return min(way.operations / rate + way.bytes / ceilings.bandwidth for way in self.ways)


@dataclass(frozen=True)
class HeadCase:
    """One line of the benchmark.

    Attributes:
        head: "pfc", "dense" or "peer".
        classes, dim, batch: C, D and the global batch.
        rate: share of the classes used each step; the dense head always uses all.
        ranks: processes; gloo on a CPU, nccl on GPUs.
        precision: of the products, "float32" or "bf16"; "fp16" is the peer's own mixed precision.
        objective: name of an objective; the baselines have CosFace alone.
        peer: folder that holds ``partial_fc_v2.py`` and ``losses.py`` of the common implementation, for "peer".
        storage: where the centers and their optimizer's state are stored, "device", "host" or "file"; pfc's alone, as
            what follows.
        storage_dir: folder of the file.
        center_dtype: how, "float32" or "bf16".
        optimizer: "row_sgd", with momentum, or "row_adagrad".
        simulated: whether one process is measured, the first of ``ranks``; the others do not exist.
    """

    head: str
    classes: int
    dim: int = 512
    batch: int = 128
    rate: float = 1.0
    ranks: int = 2
    precision: str = "float32"
    objective: str = "cosface"
    peer: str = ""
    storage: str = "device"
    storage_dir: str = ""
    center_dtype: str = "float32"
    optimizer: str = "row_sgd"
    simulated: bool = False

    def __str__(self) -> str:
        return (
            f"{self.head} C={self.classes:,} rate={self.rate:.4g} B={self.batch} D={self.dim} ranks={self.ranks}"
            f"{' simulated' * self.simulated} {self.precision} {self.objective}{self._centers}"
        )

    @property
    def _centers(self) -> str:
        usual = {"storage": "device", "center_dtype": "float32", "optimizer": "row_sgd"}
        others = [f"{name}={value}" for name in usual if (value := getattr(self, name)) != usual[name]]
        return "".join(f" {other}" for other in others)

    @property
    def processes(self) -> int:
        """How many processes are measured."""
        return 1 if self.simulated else self.ranks

    @property
    def stored_rows(self) -> int:
        """Centers that the rank with most of them stores."""
        return -(-self.classes // self.ranks)

    @property
    def row_bytes(self) -> int:
        """A center with its optimizer's state: SGD's momentum in the centers' precision, or Adagrad's one number."""
        center = self.dim * ITEM[self.center_dtype]
        return center + (center if self.optimizer == "row_sgd" else 4)

    @property
    def exchanged_bytes(self) -> int:
        """Of a step's three collectives, in pfc's head: the global batch with its labels that is gathered, the two
        numbers a sample that are summed, all samples' gradients (and one number a rank) that are summed and scattered.
        """
        if self.ranks == 1:
            return 0
        return self.batch * (4 * self.dim + 8) + 2 * 8 * self.batch + 4 * (self.batch * self.dim + self.ranks)

    @property
    def work(self) -> Work:
        """What a step must do on the rank with most rows, whoever does it."""
        rows = expected_rows(self.classes, self.ranks, self.rate, self.batch)
        moved = 5 if self.optimizer == "row_sgd" else 3
        update = ITEM[self.center_dtype] * moved * rows * self.dim
        product = 2 * self.batch * rows * self.dim
        kept = 2 * self.batch * rows * ITEM[self.precision]
        ways = [Way(3 * product, update + kept), Way(4 * product, update)]
        if self.objective == "p2sgrad":
            ways.append(Way(4 * (rows + self.batch) * self.dim**2, update))
        return Work(rows, tuple(ways))


@dataclass(frozen=True)
class Measurement:
    """One round of a case.

    Attributes:
        seconds: of each timed step, on the slowest rank.
        peak_bytes: of the rank that takes most.
        phases: part of the step → kind of work → seconds, from steps profiled apart (``phases.py``).
        used_rows: centers that the last of these steps used on the rank that used most; None where the head does not
            say.
    """

    seconds: list[float]
    peak_bytes: int
    phases: dict[str, dict[str, float]]
    used_rows: int | None = None


@dataclass
class Line:
    """A case and its rounds.

    Attributes:
        error: why it was not measured, in one line; empty when it was.
        died: whether that is because a rank died, not because the case does not fit.
        dense: the dense head's line at the same classes, batch, dimension, ranks and precision, where there is one.
        peer: the same of the peer, at the same rate.
    """

    case: HeadCase
    rounds: list[Measurement] = field(default_factory=list)
    ceilings: Ceilings | None = None
    error: str = ""
    died: bool = False
    dense: "Line | None" = None
    peer: "Line | None" = None

    @property
    def seconds(self) -> list[float]:
        return [seconds for one in self.rounds for seconds in one.seconds]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    @property
    def peak_bytes(self) -> int:
        return max(one.peak_bytes for one in self.rounds)

    @property
    def floor(self) -> float:
        """Seconds below which this machine cannot do the step."""
        assert self.ceilings is not None
        return self.case.work.floor(self.ceilings, self.case.precision)

    @property
    def phases(self) -> dict[str, dict[str, float]]:
        """Shares of the step, the mean over the rounds; together 1."""
        total = sum(seconds for one in self.rounds for kinds in one.phases.values() for seconds in kinds.values())
        shares: dict[str, dict[str, float]] = {}
        for one in self.rounds:
            for part, kinds in one.phases.items():
                for kind, seconds in kinds.items():
                    of_part = shares.setdefault(part, {})
                    of_part[kind] = of_part.get(kind, 0.0) + seconds / total
        return shares

    def times(self, other: "Line | None") -> float | None:
        """How many times as fast as the other line; None where one of them has no figures."""
        return other.median / self.median if other is not None and other.rounds and self.rounds else None

    def memory_of(self, other: "Line | None") -> float | None:
        """Peak memory as a share of the other line's; None where one of them has no figures."""
        return (
            self.peak_bytes / max(other.peak_bytes, 1) if other is not None and other.rounds and self.rounds else None
        )

    def to_dict(self) -> dict[str, Any]:
        case = {key: value for key, value in asdict(self.case).items() if key not in ("peer", "storage_dir")}
        if not self.rounds:
            return {**case, "error": self.error}
        work = self.case.work
        return {
            **case,
            "rows": work.rows,
            "used_rows": self.rounds[-1].used_rows,
            "operations": work.ways[0].operations,
            "bytes": work.ways[0].bytes,
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "peak_bytes": self.peak_bytes,
            "floor_s": self.floor,
            "times_floor": self.median / self.floor,
            "product_share_of_ceiling": self._product_share(),
            "times_dense": self.times(self.dense),
            "times_peer": self.times(self.peer),
            "memory_of_dense": self.memory_of(self.dense),
            "memory_of_peer": self.memory_of(self.peer),
            "phases": self.phases,
        }

    def _product_share(self) -> float:
        """The three products over the whole step, as a share of the measured rate of products."""
        assert self.ceilings is not None
        return self.case.work.ways[0].operations / self.median / self.ceilings.products[self.case.precision]
