"""Searches of a gallery by blocks: memory is bounded, the ranks share the queries, nothing is approximate.

Every figure of identification and retrieval follows from the places of a query's mates (the gallery's images of its
identity) among the others, so these are counted, and no list of neighbours is kept: there is no k that could be too
small.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

CPU = torch.device("cpu")
MEMORY = 1 << 29  # bytes
_CACHE = 1 << 24  # bytes: blocks that a CPU's cache holds are up to three times as fast
_QUERIES = 1024  # of a block, at most
_BYTES = 24  # of a cosine: itself, where it stands among the mates', and a copy of both

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
        above: how many others reach the cosine of each mate, int64 [M]: one with the same cosine counts against it.
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
) -> Mates:
    """The mates of every query; on every rank the same.

    Args:
        queries, gallery: [Q, D] and [G, D], of length 1.
        query_ids, gallery_ids: int64 [Q] and [G]; below 0 where unknown, which is nobody's mate.
        left_out: (query, row of the gallery) [P] → bool [P], which of the gallery's images of a query's identity do
            not count: itself, or those of the same camera.
        device: where to compute.
        memory: bytes to work in, besides the arguments and the result.
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

    def cosines(start: int, stop: int) -> Floats:
        """Of the mates of the queries start … stop, by the same products as the others' are."""
        found = np.zeros(starts[stop] - starts[start], dtype=np.float32)
        most = max(1, int(counts.max(initial=1)))
        step = max(1, min(_QUERIES, int((_working(memory, device) / (8 * most)) ** 0.5)))
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            rows = row[starts[begin] : starts[end]]
            if not len(rows):
                continue
            left = queries[begin:end].to(device)
            product = left @ gallery[torch.from_numpy(rows)].to(device).T
            of = torch.from_numpy(query[starts[begin] : starts[end]] - begin).to(device)
            mine = product[of, torch.arange(len(rows), device=device)]
            found[starts[begin] - starts[start] : starts[end] - starts[start]] = mine.cpu().numpy()
        return found

    (cosine,) = _shared(len(counts), lambda start, stop: (cosines(start, stop),))
    falling = np.lexsort((-cosine, query))
    return Mates(starts, row[falling], cosine[falling])


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
        queries, query_ids, gallery, gallery_ids, device, memory: as of ``find_mates``.
        moved: called at every block.
    """
    order = np.argsort(gallery_ids, kind="stable")
    first, last = _same(gallery_ids[order], query_ids)
    rows_at_once = min(_QUERIES, max(1, len(query_ids)))
    columns = max(1, min(len(gallery_ids), _working(memory, device) // (_BYTES * rows_at_once)))

    def count(start: int, stop: int) -> tuple[Ints, Floats, Ints]:
        """Of the queries start … stop."""
        above, best, who = [], [], []
        for begin in range(start, stop, rows_at_once):
            end = min(begin + rows_at_once, stop)
            block = _Block(mates, begin, end, device)
            own = order[_ranges(first[begin:end], (last - first)[begin:end])]
            own_query = np.repeat(np.arange(end - begin), (last - first)[begin:end])
            left = queries[begin:end].to(device)
            for at in range(0, len(gallery_ids), columns):
                cosines = left @ gallery[at : at + columns].to(device).T
                here = (own >= at) & (own < at + columns)
                cosines[torch.from_numpy(own_query[here]), torch.from_numpy(own[here] - at)] = -torch.inf
                block.add(cosines, at)
                moved()
            above.append(block.above())
            best.append(block.best.cpu().numpy())
            who.append(block.who.cpu().numpy())
        return _joined(above, np.int64), _joined(best, np.float32), _joined(who, np.int64)

    return Others(*_shared(len(query_ids), count))


class _Block:
    """What was counted so far of some queries."""

    def __init__(self, mates: Mates, begin: int, end: int, device: torch.device) -> None:
        counts = mates.counts[begin:end]
        self.falling = mates.cosine[mates.starts[begin] : mates.starts[end]]
        self.place = (np.repeat(np.arange(end - begin), counts), _ranges(np.zeros_like(counts), counts))
        rising = torch.full((end - begin, max(1, int(counts.max(initial=1)))), torch.inf)
        rising[self.place] = torch.from_numpy(self.falling)
        self.rising = rising.sort(dim=1).values.to(device)
        """The mates' cosines [q, m], then infinity."""
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
        queries, gallery, device, memory: as of ``find_mates``.
        k: at most the gallery's size.
        own: a row of the gallery for each query that does not count, int64 [Q].
        moved: called at every block.
    """
    rows_at_once = min(_QUERIES, max(1, len(queries)))
    columns = max(k + 1, min(len(gallery), _working(memory, device) // (_BYTES * rows_at_once)))

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

    cosine, row = _shared(len(queries), search)
    return cosine, row


def all_pairs(
    embeddings: Tensor,
    ids: Ints,
    *,
    bins: int = 1 << 18,
    device: torch.device = CPU,
    memory: int = MEMORY,
    moved: Callable[[], object] = lambda: None,
) -> tuple[Ints, Ints, NDArray[np.float64]]:
    """Histograms of the cosines of every pair of two images, each pair once, without a list of them.

    Args:
        embeddings: [N, D], of length 1.
        ids: int64 [N]; the pairs with one that is below 0 are of two identities.
        bins: of equal width from −1 to 1.
        device, memory, moved: as of ``count_others``.

    Returns:
        how many pairs of one identity and of two are in each bin, int64 [bins], and the bins' edges [bins + 1]. A
        cosine beyond ±1 by rounding is in the last bin.
    """
    known = torch.from_numpy(ids)

    def count(start: int, stop: int) -> tuple[Ints]:
        found = torch.zeros(2, bins, dtype=torch.int64, device=device)
        for rows, columns, cosines, once in _triangle(embeddings, start, stop, device, memory):
            places = ((cosines + 1) * (bins / 2)).long().clamp_(0, bins - 1)
            same = (known[rows, None] == known[None, columns]) & (known[rows, None] >= 0)
            places = torch.where(same.to(device), places, places + bins)[once]
            found += torch.bincount(places, minlength=2 * bins).view(2, bins)
            moved()
        return (found.cpu().numpy()[None],)

    (parts,) = _shared(len(ids), count, growing=True)
    same, different = parts.sum(axis=0)
    return same, different, np.linspace(-1, 1, bins + 1)


def mistaken_pairs(
    embeddings: Tensor,
    ids: Ints,
    threshold: float,
    *,
    device: torch.device = CPU,
    memory: int = MEMORY,
    moved: Callable[[], object] = lambda: None,
) -> tuple[Ints, Ints]:
    """The pairs of two images, rows int64 [P] and [P], that a threshold judges wrongly: of two identities, and as alike
    as it or more; of one, and less. Arguments as of ``all_pairs``."""
    known = torch.from_numpy(ids)

    def find(start: int, stop: int) -> tuple[Ints, Ints]:
        first, second = [], []
        for rows, columns, cosines, once in _triangle(embeddings, start, stop, device, memory):
            same = (known[rows, None] == known[None, columns]) & (known[rows, None] >= 0)
            found = (((cosines >= threshold) != same.to(device)) & once).nonzero().cpu().numpy()
            first.append(found[:, 0] + rows.start)
            second.append(found[:, 1] + columns.start)
            moved()
        return _joined(first, np.int64), _joined(second, np.int64)

    first, second = _shared(len(ids), find, growing=True)
    return first, second


def _triangle(
    embeddings: Tensor, start: int, stop: int, device: torch.device, memory: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Cosines of the rows start … stop with those before them, block by block: rows, columns, the cosines, and which of
    them count, each pair once."""
    rows_at_once = min(_QUERIES, max(1, len(embeddings)))
    columns = max(1, min(len(embeddings), _working(memory, device) // (_BYTES * rows_at_once)))
    for begin in range(start, stop, rows_at_once):
        end = min(begin + rows_at_once, stop)
        left = embeddings[begin:end].to(device)
        for at in range(0, end, columns):
            to = min(at + columns, end)
            once = torch.arange(at, to, device=device) < torch.arange(begin, end, device=device)[:, None]
            yield slice(begin, end), slice(at, to), left @ embeddings[at:to].to(device).T, once


def _working(memory: int, device: torch.device) -> int:
    return min(memory, _CACHE) if device.type == "cpu" else memory


def _same(ordered: Ints, ids: Ints) -> tuple[Ints, Ints]:
    """Where the identities stand among the ordered ones, from and to; nowhere for those below 0."""
    first, last = np.searchsorted(ordered, ids, "left"), np.searchsorted(ordered, ids, "right")
    return first, np.where(ids < 0, first, last)


def _ranges(first: Ints, counts: Ints) -> Ints:
    """first[0], first[0] + 1, … (counts[0] of them), first[1], …"""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - counts), counts)


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def _shared(number: int, work: Callable[[int, int], tuple[np.ndarray, ...]], *, growing: bool = False) -> Iterator:
    """work(start, stop) of this rank's part of ``number`` items, and what the others found, joined."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    bounds = [round(number * (r / world_size) ** (0.5 if growing else 1)) for r in range(world_size + 1)]
    mine = work(bounds[rank], bounds[rank + 1])
    if world_size == 1:
        return iter(mine)
    parts: list[tuple[np.ndarray, ...]] = [()] * world_size
    dist.all_gather_object(parts, mine)
    return iter([np.concatenate(one) for one in zip(*parts, strict=True)])
