"""Searches of a gallery by blocks: the ranks share the queries, nothing is approximate.

Every figure of identification and retrieval follows from the places of a query's mates (the gallery's images of its
identity) among the others, so these are counted, and no list of neighbours is kept: there is no k that could be too
small. Memory grows with the number of mates, not with queries times gallery.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .metrics import TIE

CPU = torch.device("cpu")
MEMORY = 1 << 29  # bytes
_CACHE = 1 << 24  # bytes: blocks that a CPU's cache holds are up to three times as fast
QUERIES = 1024  # of a block, at most
BYTES = 24  # of a cosine: itself, where it stands among the mates', and a copy of both

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Mates:
    """The gallery's images of each query's identity: those of query i stand in ``starts[i] : starts[i + 1]``.

    Attributes:
        starts: int64 [Q + 1].
        row: of the gallery, int64 [M].
        cosine: float32 [M]; within a query the largest first.
    """

    starts: Ints
    row: Ints
    cosine: Floats

    @property
    def counts(self) -> Ints:
        return np.diff(self.starts)

    @property
    def query(self) -> Ints:
        """Whose mate each is, int64 [M]."""
        return np.repeat(np.arange(len(self.starts) - 1), self.counts)

    @property
    def best(self) -> Floats:
        """Each query's largest cosine with a mate, float32 [Q]; −inf where it has none."""
        return self.of_best(self.cosine, -np.inf)

    def of_best(self, values: np.ndarray, otherwise: float) -> np.ndarray:
        """Of ``values`` [M] that of each query's best mate [Q]; ``otherwise`` where it has none."""
        chosen = np.full(len(self.counts), otherwise, dtype=values.dtype)
        chosen[self.counts > 0] = values[self.starts[:-1][self.counts > 0]]
        return chosen


@dataclass(frozen=True)
class Others:
    """What a gallery holds besides a query's mates.

    Attributes:
        above: how many others reach the cosine of each mate, int64 [M]: one with the same cosine, or one that is
            smaller by no more than rounding, counts against it.
        cosine: each query's largest with one of the others, float32 [Q]; −inf where there is none.
        row: the gallery's row of that one, int64 [Q]; −1 where there is none.
    """

    above: Ints
    cosine: Floats
    row: Ints


def unit(embeddings: Tensor) -> Tensor:
    """Embeddings [N, D] of length 1, float32; a zero stays one."""
    return F.normalize(embeddings.float(), dim=1)


def find_mates(
    queries: Tensor,
    query_ids: Ints,
    gallery: Tensor,
    gallery_ids: Ints,
    *,
    left_out: Callable[[Ints, Ints], NDArray[np.bool_]] | None = None,
    device: torch.device = CPU,
    memory: int = MEMORY,
    moved: Callable[[], object] = lambda: None,
) -> Mates:
    """The mates of every query; on every rank the same.

    Args:
        queries, gallery: [Q, D] and [G, D], of length 1.
        query_ids, gallery_ids: int64 [Q] and [G]; below 0 where unknown, which is nobody's mate.
        left_out: (query, row of the gallery) [P] → bool [P], which of the gallery's images of a query's identity do
            not count: itself, or those of the same camera.
        device: where to compute.
        memory: bytes to work in, besides the arguments and the result.
        moved: called at every block.
    """
    order = np.argsort(gallery_ids, kind="stable")
    first, last = _same(gallery_ids[order], query_ids)
    counts = last - first
    query = np.repeat(np.arange(len(counts)), counts)
    row = order[_ranges(first, counts)]
    if left_out is not None:
        kept = ~left_out(query, row)
        query, row = query[kept], row[kept]
    starts = np.concatenate([[0], np.cumsum(np.bincount(query, minlength=len(counts)))]).astype(np.int64)

    most = max(1, int(counts.max(initial=1)))
    room = working(memory, device) // 2
    # Rows of the mates, and their products with the queries: 4·D and 4·step bytes for each.
    step = max(1, min(QUERIES, int((room / (4 * most)) ** 0.5), room // (4 * most * gallery.shape[1])))

    def find(start: int, stop: int) -> tuple[Ints, Floats]:
        """Rows and cosines of the mates of the queries start … stop."""
        found = np.zeros(starts[stop] - starts[start], dtype=np.float32)
        rows = row[starts[start] : starts[stop]].copy()
        for begin in range(start, stop, step):
            moved()
            end = min(begin + step, stop)
            here = slice(starts[begin] - starts[start], starts[end] - starts[start])
            product = queries[begin:end].to(device) @ gallery[torch.from_numpy(rows[here])].to(device).T
            of = query[starts[begin] : starts[end]] - begin
            mine = product[torch.from_numpy(of).to(device), torch.arange(len(of), device=device)].cpu().numpy()
            falling = np.argsort(4.0 * of - mine, kind="stable")  # cosines differ by less than 4
            found[here], rows[here] = mine[falling], rows[here][falling]
        return rows, found

    rows, cosine = shared(len(counts), find)
    return Mates(starts, rows, cosine)


def count_others(
    queries: Tensor,
    query_ids: Ints,
    gallery: Tensor,
    gallery_ids: Ints,
    mates: Mates,
    *,
    device: torch.device = CPU,
    memory: int = MEMORY,
    moved: Callable[[], object] = lambda: None,
) -> Others:
    """How the gallery's other identities stand beside the mates; on every rank the same.

    The gallery may be a part of a larger one that ``mates`` are of: ``above`` of the parts adds up.

    Args:
        queries, query_ids, gallery, gallery_ids, device, memory, moved: as of ``find_mates``.
    """
    order = np.argsort(gallery_ids, kind="stable")
    first, last = _same(gallery_ids[order], query_ids)
    room = working(memory, device) // BYTES
    rows_at_once = max(1, min(QUERIES, len(query_ids), room // (int(mates.counts.max(initial=0)) + 1)))
    columns = max(1, min(len(gallery_ids), room // rows_at_once))

    def count(start: int, stop: int) -> tuple[Ints, Floats, Ints]:
        """Of the queries start … stop."""
        above, best, who = [], [], []
        for begin in range(start, stop, rows_at_once):
            end = min(begin + rows_at_once, stop)
            block = _Block(mates, begin, end, device)
            counts = (last - first)[begin:end]
            own, of = order[_ranges(first[begin:end], counts)], np.repeat(np.arange(end - begin), counts)
            by_row = np.argsort(own, kind="stable")
            own, of = own[by_row], of[by_row]
            left = queries[begin:end].to(device)
            for at in range(0, len(gallery_ids), columns):
                cosines = left @ gallery[at : at + columns].to(device).T
                here = slice(*np.searchsorted(own, [at, at + columns]))
                cosines[torch.from_numpy(of[here]), torch.from_numpy(own[here] - at)] = -torch.inf
                block.add(cosines, at)
                moved()
            above.append(block.above())
            best.append(block.best.cpu().numpy())
            who.append(block.who.cpu().numpy())
        return joined(above, np.int64), joined(best, np.float32), joined(who, np.int64)

    return Others(*shared(len(query_ids), count))


class _Block:
    """What was counted so far of some queries."""

    def __init__(self, mates: Mates, begin: int, end: int, device: torch.device) -> None:
        counts = mates.counts[begin:end]
        self.falling = mates.cosine[mates.starts[begin] : mates.starts[end]]
        self.place = (np.repeat(np.arange(end - begin), counts), _ranges(np.zeros_like(counts), counts))
        rising = torch.full((end - begin, max(1, int(counts.max(initial=1)))), torch.inf)
        rising[self.place] = torch.from_numpy(self.falling)
        self.rising = rising.sort(dim=1).values.to(device) - TIE
        """What another has to reach: the mates' cosines [q, m], then infinity."""
        self.number = counts
        self.reached = torch.zeros(end - begin, self.rising.shape[1] + 1, dtype=torch.int64, device=device)
        """[q, m + 1]: how many others reach so many of them."""
        self.best = torch.full((end - begin,), -torch.inf, device=device)
        self.who = torch.full((end - begin,), -1, dtype=torch.int64, device=device)

    def add(self, cosines: Tensor, at: int) -> None:
        """Counts [q, g]; −inf for what does not count."""
        top = cosines.amax(dim=1)
        better = (top > self.best).nonzero()[:, 0]
        self.who[better] = cosines[better].argmax(dim=1) + at
        self.best = torch.maximum(self.best, top)
        near = (top >= self.rising[:, 0]).nonzero()[:, 0]  # of the others no one reaches a mate
        if len(near):
            places = torch.searchsorted(self.rising[near], cosines[near], right=True)
            one = torch.ones((), dtype=torch.int64, device=cosines.device).expand(places.shape)
            self.reached[near] = self.reached[near].scatter_add(1, places, one)

    def above(self) -> Ints:
        """Of each mate, those with the largest cosines first."""
        reaching = self.reached.flip(1).cumsum(1).flip(1)[:, 1:].cpu().numpy()  # [q, m], rising
        query, place = self.place
        return reaching[query, self.number[query] - 1 - place]


def nearest(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    *,
    own: Ints | None = None,
    device: torch.device = CPU,
    memory: int = MEMORY,
    moved: Callable[[], object] = lambda: None,
) -> tuple[Floats, Ints]:
    """The k rows of the gallery nearest to each query: cosines float32 [Q, k], falling, and rows int64 [Q, k].

    Args:
        queries, gallery, device, memory, moved: as of ``find_mates``.
        k: at most the gallery's size.
        own: a row of the gallery for each query that does not count, int64 [Q].
    """
    rows_at_once = min(QUERIES, max(1, len(queries)))
    columns = max(k + 1, min(len(gallery), working(memory, device) // (BYTES * rows_at_once)))

    def search(start: int, stop: int) -> tuple[Floats, Ints]:
        cosine, row = [np.zeros((0, k), np.float32)], [np.zeros((0, k), np.int64)]
        for begin in range(start, stop, rows_at_once):
            end = min(begin + rows_at_once, stop)
            left = queries[begin:end].to(device)
            best = torch.full((end - begin, k), -torch.inf, device=device)
            who = torch.full((end - begin, k), -1, dtype=torch.int64, device=device)
            for at in range(0, len(gallery), columns):
                cosines = left @ gallery[at : at + columns].to(device).T
                if own is not None:
                    there = np.flatnonzero((own[begin:end] >= at) & (own[begin:end] < at + columns))
                    cosines[torch.from_numpy(there), torch.from_numpy(own[begin:end][there] - at)] = -torch.inf
                values, places = cosines.topk(min(k, cosines.shape[1]), dim=1)
                best, chosen = torch.cat([best, values], dim=1).topk(k, dim=1)
                who = torch.cat([who, places + at], dim=1).gather(1, chosen)
                moved()
            cosine.append(best.cpu().numpy())
            row.append(who.cpu().numpy())
        return np.concatenate(cosine), np.concatenate(row)

    cosine, row = shared(len(queries), search)
    return cosine, row


def _same(ordered: Ints, ids: Ints) -> tuple[Ints, Ints]:
    """Where the identities stand among the ordered ones, from and to; nowhere for those below 0."""
    first, last = np.searchsorted(ordered, ids, "left"), np.searchsorted(ordered, ids, "right")
    return first, np.where(ids < 0, first, last)


def _ranges(first: Ints, counts: Ints) -> Ints:
    """first[0], first[0] + 1, … (counts[0] of them), first[1], …"""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - counts), counts)


def working(memory: int, device: torch.device) -> int:
    """Bytes of the blocks at work."""
    return min(memory, _CACHE) if device.type == "cpu" else memory


def joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """One array of several, or of none."""
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def shared(number: int, work: Callable[[int, int], tuple[np.ndarray, ...]], *, growing: bool = False) -> Iterator:
    """work(start, stop) of this rank's part of ``number`` items, and what the others found, joined.

    ``growing``: an item's work grows with its number.
    """
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    bounds = [round(number * (r / world_size) ** (0.5 if growing else 1)) for r in range(world_size + 1)]
    mine = work(bounds[rank], bounds[rank + 1])
    if world_size == 1:
        return iter(mine)
    parts: list[tuple[np.ndarray, ...]] = [()] * world_size
    dist.all_gather_object(parts, mine)
    return iter([np.concatenate(one) for one in zip(*parts, strict=True)])
