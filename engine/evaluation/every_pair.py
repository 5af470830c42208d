"""Every pair of two images, each once, by blocks: counted in histograms, never listed whole. The ranks share them."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .search import BYTES, CPU, MEMORY, QUERIES, Ints, joined, shared, working

BINS = 1 << 18


def bins_of(cosines: Tensor) -> Tensor:
    """The bin of each cosine, int32, of ``BINS`` of equal width from −1 to 1; beyond ±1 by rounding the outermost."""
    return ((cosines + 1) * (BINS / 2)).to(torch.int32).clamp_(0, BINS - 1)


def edges() -> NDArray[np.float64]:
    """The bins' edges [BINS + 1]."""
    return np.linspace(-1, 1, BINS + 1)


def histograms(
    embeddings: Tensor,
    ids: Ints,
    *,
    device: torch.device = CPU,
    memory: int = MEMORY,
    moved: Callable[[], object] = lambda: None,
) -> tuple[Ints, Ints]:
    """How many pairs of one identity and of two have a cosine in each bin, int64 [BINS] each.

    Args:
        embeddings: [N, D], of length 1.
        ids: int64 [N], from 0 on.
        device, memory, moved: as of ``find_mates``.
    """
    known = torch.from_numpy(ids).to(device)

    def count(start: int, stop: int) -> tuple[Ints]:
        found = torch.zeros(2 * BINS, dtype=torch.int64, device=device)
        for rows, columns, cosines, once in _triangle(embeddings, start, stop, device, memory):
            places = bins_of(cosines)
            places.add_((known[rows, None] != known[None, columns]).to(torch.int32), alpha=BINS)
            found += torch.bincount(places.flatten() if once is None else places[once], minlength=2 * BINS)
            moved()
        return (found.cpu().numpy().reshape(1, 2, BINS),)

    (parts,) = shared(len(ids), count, growing=True)
    same, different = parts.sum(axis=0)
    return same, different


def mistaken(
    embeddings: Tensor,
    ids: Ints,
    threshold: float,
    *,
    device: torch.device = CPU,
    memory: int = MEMORY,
    moved: Callable[[], object] = lambda: None,
) -> tuple[Ints, Ints]:
    """The pairs of two images, rows int64 [P] and [P], that a threshold judges wrongly: of two identities, and as alike
    as it or more; of one, and less. Arguments as of ``histograms``."""
    known = torch.from_numpy(ids).to(device)

    def find(start: int, stop: int) -> tuple[Ints, Ints]:
        first, second = [], []
        for rows, columns, cosines, once in _triangle(embeddings, start, stop, device, memory):
            wrong = (cosines >= threshold) != (known[rows, None] == known[None, columns])
            found = (wrong if once is None else wrong & once).nonzero().cpu().numpy()
            first.append(found[:, 0] + rows.start)
            second.append(found[:, 1] + columns.start)
            moved()
        return joined(first, np.int64), joined(second, np.int64)

    first, second = shared(len(ids), find, growing=True)
    return first, second


def _triangle(
    embeddings: Tensor, start: int, stop: int, device: torch.device, memory: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """Cosines of the rows start … stop with those before them, block by block: rows, columns, the cosines, and which of
    them count so that each pair does once; None where all do."""
    rows_at_once = min(QUERIES, max(1, len(embeddings)))
    columns = max(1, min(len(embeddings), working(memory, device) // (BYTES * rows_at_once)))
    for begin in range(start, stop, rows_at_once):
        end = min(begin + rows_at_once, stop)
        left = embeddings[begin:end].to(device)
        for at in range(0, end, columns):
            to = min(at + columns, end)
            once = None
            if to > begin:
                once = torch.arange(at, to, device=device) < torch.arange(begin, end, device=device)[:, None]
            yield slice(begin, end), slice(at, to), left @ embeddings[at:to].to(device).T, once
