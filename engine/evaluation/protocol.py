"""Judges embeddings by a protocol: which figures, is said by the table's columns (docs/evaluation.md)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...data.errors import UndecodableImage, UsageError
from ...data.protocols.images import open_images
from ...data.protocols.table import ROLES, Protocol
from . import retrieval
from .evaluate import embed_images
from .identification import FPIR_LEVELS, RANKS, rank_k, tpir_at_fpir
from .intervals import SAMPLES, Weights, over_identities
from .metrics import FAR_LEVELS, area_and_eer, minimum_detection_cost, power_of_ten, true_accept_rates
from .search import CPU, MEMORY, Ints, all_pairs, count_others, find_mates, unit
from .templates import cosines_of, pool

LEVELS = (1e-1, *FAR_LEVELS)
_CURVE = sorted({*LEVELS, *(10.0 ** (-power / 4) for power in range(25))})
_CMC = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
RECALLS = (1, 10, 100, 1000)
MOST_SHOWN = 24  # probes with their pictures, in a report


@dataclass
class Judgement:
    """What a protocol says of embeddings.

    Attributes:
        set: the protocol's name.
        counts: how many images, templates, probes, impostor pairs, ... the figures are of.
        figures: name → value.
        intervals: name → (low, high), 95 %, by the bootstrap over identities; not of every figure.
        curves: name → (x, y, low, high), float64 [4, n].
        worst: the mated probes that another beats by most, as rows of the table: (probe, what it was taken for, its
            best mate, the two cosines).
    """

    set: str
    counts: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    curves: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    worst: list[tuple[int, int, int, float, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A flat object, as it stands in evaluation.jsonl: intervals as ``NAME_low`` and ``NAME_high``."""
        low = {f"{name}_low": interval[0] for name, interval in self.intervals.items()}
        high = {f"{name}_high": interval[1] for name, interval in self.intervals.items()}
        return {"set": self.set, **self.counts, **self.figures, **low, **high}

    def add(self, ids: Sequence[Ints], figures: Callable[[Weights | None], dict[str, float]], samples: int) -> None:
        """Figures of weights, with their intervals; one called ``CURVE:X`` is a point of a curve."""
        values, intervals = figures(None), over_identities(ids, figures, samples=samples)
        points: dict[str, list[tuple[float, ...]]] = {}
        for name, value in values.items():
            curve, colon, x = name.partition(":")
            if colon:
                points.setdefault(curve, []).append((float(x), value, *intervals.pop(name, (np.nan, np.nan))))
            else:
                self.figures[name] = value
        self.intervals |= intervals
        self.curves |= {name: np.array(of, dtype=np.float64).T for name, of in points.items()}

    def save(self, path: Path) -> None:
        """Writes all of it as one .npz."""
        told = {"set": self.set, "counts": self.counts, "figures": self.figures, "intervals": self.intervals}
        arrays: dict[str, Any] = {f"curve {name}": curve for name, curve in self.curves.items()}
        np.savez_compressed(path, about=json.dumps(told), worst=np.array(self.worst).reshape(-1, 5), **arrays)

    @staticmethod
    def load(path: Path) -> "Judgement":
        with np.load(path) as arrays:
            told = json.loads(str(arrays["about"]))
            worst = [(int(a), int(b), int(c), float(x), float(y)) for a, b, c, x, y in arrays["worst"]]
            curves = {name.removeprefix("curve "): arrays[name] for name in arrays.files if name.startswith("curve ")}
            return Judgement(**told, curves=curves, worst=worst)


@dataclass(frozen=True)
class How:
    """How to compute, the same on every rank: where, in how many bytes, and how many samples of the bootstrap."""

    device: torch.device = CPU
    memory: int = MEMORY
    samples: int = SAMPLES
    moved: Callable[[], object] = lambda: None

    @property
    def search(self) -> dict[str, Any]:
        return {"device": self.device, "memory": self.memory}


def embed_protocol(network: nn.Module, protocol: Protocol, *, image_size: tuple[int, int], **reading: Any) -> Tensor:
    """The embeddings of a protocol's images, aligned where the table has landmarks, as ``embed_images`` gives them.

    Raises:
        UsageError: an image is not there, or cannot be decoded or aligned; it is named.
    """
    images = open_images(protocol.images, protocol.folder, protocol.landmarks, image_size)
    try:
        return embed_images(network, images, image_size=image_size, **reading)
    except UndecodableImage as error:
        raise UsageError(
            f"{protocol.name}: {protocol.images[error.place]} cannot be decoded: {error.problem}; leave its row out"
        ) from None


def judge(protocol: Protocol, embeddings: Tensor, how: How | None = None) -> Judgement:
    """All figures that the table's columns allow. Ranks call it together, with the same arguments.

    Args:
        protocol: N images.
        embeddings: [N, D], not normalised where templates weigh them by their length.
        how: to compute.

    Raises:
        UsageError: an embedding is not finite, or there is nothing that could be judged.
    """
    how = How() if how is None else how
    check_embeddings(protocol, embeddings)
    result = Judgement(protocol.name, {"images": len(protocol)})
    items = items_of(protocol, embeddings)
    if protocol.template is not None:
        result.counts["templates"] = len(items.row)
    if protocol.pairs is not None:
        _verification(items, protocol, result, how)
    if protocol.has("probe"):
        _identification(items, result, how)
    elif protocol.has("query"):
        _retrieval(items, result, how, among_themselves=False)
    elif protocol.pairs is None:
        _retrieval(items, result, how, among_themselves=True)
        _all_to_all(items, result, how)
    return result


def check_embeddings(protocol: Protocol, embeddings: Tensor) -> None:
    """UsageError where there is not one for each image, or one is not finite."""
    if len(embeddings) != len(protocol):
        raise UsageError(
            f"{protocol.name}: {len(embeddings):,} embeddings for {len(protocol):,} images: give one for each "
            "row of the table, in its order"
        )
    broken = (~torch.isfinite(embeddings).all(dim=1)).nonzero()[:, 0].tolist()
    if broken:
        raise UsageError(
            f"{protocol.name}: {len(broken):,} of {len(protocol):,} embeddings are not finite, the first is that of "
            f"{protocol.images[broken[0]]}"
        )


@dataclass(frozen=True)
class Items:
    """What is compared: templates, or images. ``row`` is a row of the table that shows each."""

    unit: Tensor
    row: Ints
    identity: Ints
    role: Ints
    camera: Ints | None
    gallery: Ints | None
    code: Ints
    """Of a pair's side → the item."""

    def of(self, role: str) -> Ints:
        return np.flatnonzero(self.role == ROLES.index(role))


def items_of(protocol: Protocol, embeddings: Tensor) -> Items:
    """The images, or their templates; UsageError where a template has no embedding."""
    if protocol.template is None:
        every = np.arange(len(protocol))
        columns = protocol.identity, protocol.role, protocol.camera, protocol.gallery
        return Items(unit(embeddings), every, *columns, every)
    try:
        pooled = pool(embeddings, protocol.template, protocol.media, protocol.weight)
    except UsageError as error:
        raise UsageError(f"{protocol.name}: {error}") from None
    _, row = np.unique(protocol.template, return_index=True)
    columns = (
        None if codes is None else codes[row]
        for codes in (protocol.identity, protocol.role, protocol.camera, protocol.gallery)
    )
    return Items(pooled, row, *columns, np.arange(len(row)))  # type: ignore[arg-type]


def _verification(items: Items, protocol: Protocol, result: Judgement, how: How) -> None:
    """1:1 by a list of pairs."""
    pairs = protocol.pairs
    assert pairs is not None
    cosine, same = cosines_of(items.unit, pairs.first, pairs.second), pairs.same
    if same.all() or not same.any():
        kind = "two identities" if same.all() else "one identity"
        raise UsageError(f"{protocol.name}: none of the {len(same):,} pairs shows {kind}: give pairs of both kinds")
    ids = identities_of(items, pairs.first, pairs.second, same)
    order = np.argsort(-cosine, kind="stable")
    scores, kinds = cosine[order].astype(np.float64), same[order]
    impostors = int((~same).sum())
    result.counts |= {"pairs": len(same), "impostor_pairs": impostors}
    result.figures["auc"], result.figures["eer"] = area_and_eer(scores, kinds)
    result.figures["min_dcf"] = minimum_detection_cost(scores, kinds)
    measured = true_accept_rates(scores, kinds, _CURVE, ordered=True)

    def figures(weights: Weights | None) -> dict[str, float]:
        rates = true_accept_rates(scores, kinds, measured, weights, ordered=True)
        points = {f"tar:{level}": rate for level, rate in rates.items()}
        return points | {f"tar_at_far_{power_of_ten(level)}": rates[level] for level in LEVELS if level in rates}

    result.add([ids[pairs.first][order], ids[pairs.second][order]], figures, how.samples)
    for level in LEVELS:
        if level in measured:
            result.counts[f"impostors_at_far_{power_of_ten(level)}"] = int(level * impostors + 1e-9)


def identities_of(items: Items, first: Ints, second: Ints, same: NDArray[np.bool_]) -> Ints:
    """Of each item [n]; where the table does not say, those that pairs of one identity join are one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if (items.identity >= 0).all():
        return items.identity
    number = len(items.identity)
    joined = coo_array((np.ones(int(same.sum()), dtype=np.int8), (first[same], second[same])), shape=(number, number))
    return connected_components(joined, directed=False)[1].astype(np.int64)


def _identification(items: Items, result: Judgement, how: How) -> None:
    """1:N, closed and open; in each gallery apart, and the mean of them."""
    probes, distractors = items.of("probe"), items.of("distractor")
    galleries = items.of("gallery")
    if not len(galleries):
        _against_distractors(items, probes, distractors, result, how)
        return
    codes = np.zeros(len(galleries), np.int64) if items.gallery is None else items.gallery[galleries]
    found = []
    for code in np.unique(codes):
        shown = code == codes[0]
        found.append(_Search(items, probes, galleries[codes == code], distractors, result if shown else None, how))
    result.counts |= {"probes": len(probes), "gallery": len(galleries), "distractors": len(distractors)}
    result.counts["mated_probes"] = int(sum(np.isfinite(one.mate).sum() for one in found))
    result.counts["non_mated_probes"] = int(sum((~np.isfinite(one.mate)).sum() for one in found))
    if not result.counts["mated_probes"]:
        raise UsageError(f"{result.set}: no probe has its identity in the gallery")

    def figures(weights: Weights | None) -> dict[str, float]:
        each = [one.figures(weights) for one in found]
        each = [one for one in each if np.isfinite(one["rank_1"])]  # a gallery without mates says nothing
        names = [name for name in (each[0] if each else {}) if all(name in one for one in each)]
        return {name: float(np.mean([one[name] for one in each])) for name in names}

    result.add([items.identity[probes]], figures, how.samples)


class _Search:
    """All probes in one gallery with the distractors: what each found."""

    def __init__(
        self, items: Items, probes: Ints, gallery: Ints, distractors: Ints, shown: Judgement | None, how: How
    ) -> None:
        queries, ids = items.unit[probes], items.identity[probes]
        held = items.unit[gallery]
        mates = find_mates(queries, ids, held, items.identity[gallery], **how.search)
        others = count_others(queries, ids, held, items.identity[gallery], mates, moved=how.moved, **how.search)
        self.mate = mates.best
        self.above = mates.of_best(others.above, 0)
        self.other, taken = others.cosine.copy(), np.where(others.row >= 0, gallery[others.row], -1)
        self.sizes: dict[int, NDArray[np.bool_]] = {}
        """Number of distractors → whether each probe's mate is the first."""
        for start, stop in _parts(len(distractors)):
            part = distractors[start:stop]
            unknown = np.full(len(part), -1, dtype=np.int64)
            more = count_others(queries, ids, items.unit[part], unknown, mates, moved=how.moved, **how.search)
            self.above = self.above + mates.of_best(more.above, 0)
            taken = np.where(more.cosine > self.other, part[more.row], taken)
            self.other = np.maximum(self.other, more.cosine)
            self.sizes[stop] = self.above == 0
        if shown is not None:
            _tell_worst(items, probes, taken, mates.of_best(gallery[mates.row], -1), self.other, self.mate, shown)

    def figures(self, weights: Weights | None) -> dict[str, float]:
        found = {f"cmc:{k}": rank_k(k, self.mate, self.above, weights) for k in _CMC}
        found |= {f"rank_{k}": rank_k(k, self.mate, self.above, weights) for k in RANKS}
        rates = tpir_at_fpir(_CURVE, self.mate, self.other, weights)
        found |= {f"tpir:{level}": rate for level, rate in rates.items()}
        found |= {f"tpir_at_fpir_{power_of_ten(level)}": rates[level] for level in FPIR_LEVELS if level in rates}
        for size, right in self.sizes.items():
            found[f"rank_1_with_{size}_distractors"] = rank_k(1, self.mate, (~right).astype(np.int64), weights)
        return found


def _against_distractors(items: Items, probes: Ints, distractors: Ints, result: Judgement, how: How) -> None:
    """MegaFace: each two probes of one identity, the second alone among the distractors (Kemelmacher et al. 2016)."""
    queries, ids = items.unit[probes], items.identity[probes]
    mates = find_mates(queries, ids, queries, ids, left_out=lambda query, row: query == row, **how.search)
    if not len(mates.row):
        raise UsageError(f"{result.set}: no identity has two probes: there is nothing to find among the distractors")
    above = np.zeros(len(mates.row), dtype=np.int64)
    right: dict[int, NDArray[np.bool_]] = {}
    for start, stop in _parts(len(distractors)):
        part = items.unit[distractors[start:stop]]
        unknown = np.full(stop - start, -1, dtype=np.int64)
        above += count_others(queries, ids, part, unknown, mates, moved=how.moved, **how.search).above
        right[stop] = above == 0
    result.counts |= {"probes": len(probes), "distractors": len(distractors), "searches": len(mates.row)}

    def figures(weights: Weights | None) -> dict[str, float]:
        every = np.zeros(len(above), dtype=np.float32)
        first = {n: rank_k(1, every, (~one).astype(np.int64), weights) for n, one in right.items()}
        found = {f"distractors:{n}": rate for n, rate in first.items()}
        found |= {f"rank_1_with_{n}_distractors": rate for n, rate in first.items()}
        return found | {f"rank_{k}": rank_k(k, every, above, weights) for k in RANKS}

    result.add([ids[mates.query]], figures, how.samples)


def _retrieval(items: Items, result: Judgement, how: How, *, among_themselves: bool) -> None:
    """Queries in a gallery, without what the same camera took; or each image among all others."""
    if among_themselves:
        queries = found = np.arange(len(items.row))
        left_out = lambda query, row: query == row  # noqa: E731
    else:
        queries, found = items.of("query"), np.sort(np.concatenate([items.of("gallery"), items.of("distractor")]))
        camera = items.camera

        def left_out(query: Ints, row: Ints) -> NDArray[np.bool_]:
            if camera is None:
                return np.zeros(len(query), dtype=bool)
            one, other = camera[queries[query]], camera[found[row]]
            return (one == other) & (one >= 0)

    ids = items.identity[queries]
    held, held_ids = items.unit[found], items.identity[found]
    mates = find_mates(items.unit[queries], ids, held, held_ids, left_out=left_out, **how.search)
    mated = mates.counts > 0
    result.counts |= {"queries": int(mated.sum()), "queries_without_mates": int((~mated).sum()), "gallery": len(found)}
    if not mated.any():
        raise UsageError(f"{result.set}: no query has an image of its identity to find")
    others = count_others(items.unit[queries], ids, held, held_ids, mates, moved=how.moved, **how.search)
    places = retrieval.places_of(mates, others)
    starts = np.concatenate([[0], np.cumsum(mates.counts[mated])])
    recall, ks = ("recall_at", RECALLS) if among_themselves else ("cmc", RANKS)
    each = {f"{recall}_{k}": retrieval.found_within(k, places, starts) for k in ks if k < max(2, len(found))}
    each["map"] = retrieval.average_precision(places, starts)
    if among_themselves:
        each["map_at_r"] = retrieval.average_precision_at_r(places, starts)
        each["r_precision"] = retrieval.r_precision(places, starts)
    else:
        each["minp"] = retrieval.inverse_negative_penalty(places, starts)

    each |= {f"cmc:{k}": retrieval.found_within(k, places, starts) for k in _CMC if k <= len(found)}

    def figures(weights: Weights | None) -> dict[str, float]:
        weights = np.ones(len(starts) - 1) if weights is None else weights
        total = weights.sum()
        return {name: float(values @ weights / total) if total else float("nan") for name, values in each.items()}

    result.add([ids[mated]], figures, how.samples)
    taken = np.where(others.row >= 0, found[others.row], -1)
    _tell_worst(items, queries, taken, mates.of_best(found[mates.row], -1), others.cosine, mates.best, result)


def _all_to_all(items: Items, result: Judgement, how: How) -> None:
    """1:1 by every pair of two images: a threshold is a bin's edge, and never accepts more than it may."""
    same, different, _ = all_pairs(items.unit, items.identity, moved=how.moved, **how.search)
    if not same.sum() or not different.sum():
        return
    result.counts |= {"pairs": int(same.sum() + different.sum()), "impostor_pairs": int(different.sum())}
    accepted, impostors = np.cumsum(same[::-1])[::-1], np.cumsum(different[::-1])[::-1]  # from each bin on
    rates = {}
    for level in _CURVE:
        allowed = int(level * different.sum() + 1e-9)
        if allowed >= 1:
            bin_ = int(np.searchsorted(-impostors, -allowed))  # the first from which few enough are accepted
            rates[level] = float(accepted[bin_] / same.sum()) if bin_ < len(accepted) else 0.0
    result.curves["tar"] = np.array([[x, y, np.nan, np.nan] for x, y in rates.items()]).reshape(-1, 4).T
    for level in LEVELS:
        if level in rates:
            result.figures[f"tar_at_far_{power_of_ten(level)}"] = rates[level]
            result.counts[f"impostors_at_far_{power_of_ten(level)}"] = int(level * different.sum() + 1e-9)


def _tell_worst(
    items: Items, probes: Ints, taken: Ints, best: Ints, other: np.ndarray, mate: np.ndarray, result: Judgement
) -> None:
    """The mated probes that another beats by most, as rows of the table."""
    mated = np.flatnonzero(np.isfinite(mate) & (taken >= 0))
    worst = mated[np.argsort((mate - other)[mated], kind="stable")][:MOST_SHOWN]
    rows = items.row
    result.worst = [
        (int(rows[probes[at]]), int(rows[taken[at]]), int(rows[best[at]]), float(other[at]), float(mate[at]))
        for at in worst
    ]


def _parts(distractors: int) -> list[tuple[int, int]]:
    """Parts of the distractors: the first 10, up to 100, ... and all."""
    ends = [10**power for power in range(1, 12) if 10**power < distractors] + [distractors] * (distractors > 0)
    return list(zip([0, *ends], ends, strict=False))
