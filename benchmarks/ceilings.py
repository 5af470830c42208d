"""What this machine can do at best: matrix products and memory, with as many processes at work as a case has ranks."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ranks import Rank, run

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
_SIDE = {"cpu": 2048, "cuda": 8192}
"""Of the square matrices: large, and not the head's own shapes, whose rate would hide what these shapes lose."""
_NUMBERS = 1 << 27
"""float32 numbers of each of the two tensors that are copied, 512 MiB: far more than any cache holds."""


@dataclass(frozen=True)
class Ceilings:
    """The best that a rank reached while all ranks were at it.

    Attributes:
        ranks: processes at work.
        products: precision → operations a second of a large square product.
        bandwidth: bytes a second, read and written ones added up, of copying or of scaling in place, whichever is
            faster: a copy also reads the lines that it is about to overwrite.
    """

    ranks: int
    products: dict[str, float]
    bandwidth: float

    def best(self, other: "Ceilings | None") -> "Ceilings":
        """The higher of two measurements, number by number."""
        if other is None:
            return self
        products = {name: max(rate, other.products[name]) for name, rate in self.products.items()}
        return Ceilings(self.ranks, products, max(self.bandwidth, other.bandwidth))

    def to_dict(self) -> dict[str, Any]:
        return {
            "ranks": self.ranks,
            "products_per_s": self.products,
            "bytes_per_s": self.bandwidth,
        }


def measure_ceilings(ranks: int, *, threads: int, precisions: list[str], seconds: float = 1.0) -> Ceilings:
    """Measures each ceiling for about ``seconds``, in processes of their own.

    Raises:
        RankDied: a process ended before it was done.
    """
    results = run(_measure, ranks, threads, precisions, seconds)
    products = {name: max(result["products"][name] for result in results) for name in precisions}
    return Ceilings(ranks, products, max(result["bandwidth"] for result in results))


def _measure(rank: Rank, precisions: list[str], seconds: float) -> dict[str, Any]:
    return rank_ceilings(rank, precisions, seconds, side=_SIDE[rank.device.type], numbers=_NUMBERS)


def rank_ceilings(rank: Rank, precisions: list[str], seconds: float, *, side: int, numbers: int) -> dict[str, Any]:
    """One rank's ``products`` and ``bandwidth`` as in ``Ceilings``, each measured for about ``seconds``.

    Args:
        side: of the square matrices.
        numbers: float32 numbers of each of the two tensors that are copied.
    """
    products = {}
    for name in precisions:
        matrix = torch.randn(side, side, device=rank.device).to(DTYPES[name])
        out = torch.empty_like(matrix)
        products[name] = 2 * side**3 / _fastest(rank, lambda: torch.mm(matrix, matrix, out=out), seconds)  # noqa: B023
    source, target = (torch.zeros(numbers, device=rank.device) for _ in range(2))
    moved = 2 * source.nbytes

    def copy() -> Tensor:
        return target.copy_(source)

    def scale() -> Tensor:
        return target.mul_(0.5)

    return {"products": products, "bandwidth": moved / min(_fastest(rank, way, seconds) for way in (copy, scale))}


def _fastest(rank: Rank, work: Callable[[], Tensor], seconds: float) -> float:
    """The shortest time of ``work``, repeated for so long that every rank is at it during the shortest."""
    work()
    rank.wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        rank.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best
