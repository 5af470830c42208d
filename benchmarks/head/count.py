"""What a step of the head must do: operations and bytes, and the time that they take at the machine's ceilings.

B global batch, D dimension, K rows used on this rank; per rank and step. The rows are read once for the loss. The row
update reads and writes them and SGD's momentum: 5·K·D numbers in float32. The products are three (cosines, embeddings'
gradient, rows' gradient), 6·B·K·D operations; the third needs the probabilities again, which are either kept, B·K
numbers of the products' precision written and read, or made once more, 2·B·K·D operations. P2SGrad may take the
Gram matrix in place of the cosines: 4·K·D² + 4·B·D² operations, and nothing kept.

Not counted: exponentials, the exchange between the ranks, the sample, and all that is done to numbers in the cache.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ceilings import Ceilings

if TYPE_CHECKING:
    from .case import HeadCase

_ITEM = {"float32": 4, "bf16": 2}
"""Bytes of a number in the products' precision."""


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
        ways: the ways to do it; the first is the one with three products and kept probabilities.
    """

    rows: float
    ways: tuple[Way, ...]


def expected_rows(classes: int, ranks: int, rate: float, batch: int) -> float:
    """K of the rank with most rows: the share ``rate`` of its classes, and of the others those that the batch brings.

    The batch's labels are drawn uniformly, so one class is missing from it with probability (1 − 1/C)^B.
    """
    here = -(-classes // ranks)
    return here * (rate + (1 - rate) * (1 - (1 - 1 / classes) ** batch))


def work(case: "HeadCase") -> Work:
    """The work of a step on the rank with most rows."""
    rows = expected_rows(case.classes, case.ranks, case.rate, case.batch)
    update = 4 * 5 * rows * case.dim
    product = 2 * case.batch * rows * case.dim
    kept = 2 * case.batch * rows * _ITEM[case.precision]
    ways = [Way(3 * product, update + kept), Way(4 * product, update)]
    if case.objective == "p2sgrad":
        ways.append(Way(4 * (rows + case.batch) * case.dim**2, update))
    return Work(rows, tuple(ways))


def floor(work: Work, ceilings: Ceilings, precision: str) -> float:
    """Seconds of the cheapest way: operations at the products' rate plus bytes at the memory's, nothing overlapped."""
    rate = ceilings.products[precision]
    return min(way.operations / rate + way.bytes / ceilings.bandwidth for way in work.ways)
