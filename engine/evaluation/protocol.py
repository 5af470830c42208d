"""Judges embeddings by a protocol: which figures, is said by the table's columns (docs/evaluation.md)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...data.errors import UndecodableImage, UsageError
from ...data.protocols.table import Protocol
from . import retrieval
from .evaluate import Encoded, embed_images
from .every_pair import histograms
from .identification import FPIR_LEVELS, RANKS, rank_k, tpir_at_fpir
from .intervals import Weights
from .items import Items, check_embeddings, identities_of, items_of
from .judgement import How, Judgement
from .metrics import FAR_LEVELS, area_and_eer, minimum_detection_cost, power_of_ten, true_accept_rates
from .search import Ints, count_others, find_mates
from .templates import cosines_of

LEVELS = (1e-1, *FAR_LEVELS)
_CURVE = sorted({*LEVELS, *(10.0 ** (-power / 4) for power in range(25))})
_CMC = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
RECALLS = (1, 10, 100, 1000)
MOST_SHOWN = 24  # probes with their pictures, in a report


def embed_protocol(network: nn.Module, protocol: Protocol, images: Sequence[Encoded], **reading: Any) -> Tensor:
    """The embeddings of a protocol's images, as ``embed_images`` gives them.

    Raises:
        UsageError: an image cannot be read, decoded or aligned; it is named.
    """
    try:
        return embed_images(network, images, **reading)
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
        _every_pair(items, result, how)
    return result


def _verification(items: Items, protocol: Protocol, result: Judgement, how: How) -> None:
    """1:1 by a list of pairs."""
    pairs = protocol.pairs
    assert pairs is not None
    cosine, same = cosines_of(items.unit, pairs.first, pairs.second, moved=how.moved), pairs.same
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

    result.add([ids[pairs.first][order], ids[pairs.second][order]], figures, how)
    for level in LEVELS:
        if level in measured:
            result.counts[f"impostors_at_far_{power_of_ten(level)}"] = int(level * impostors + 1e-9)


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

    result.add([items.identity[probes]], figures, how)


class _Search:
    """All probes in one gallery with the distractors: what each found."""

    def __init__(
        self, items: Items, probes: Ints, gallery: Ints, distractors: Ints, shown: Judgement | None, how: How
    ) -> None:
        queries, ids = items.unit[probes], items.identity[probes]
        held = items.unit[gallery]
        mates = find_mates(queries, ids, held, items.identity[gallery], **how.search)
        others = count_others(queries, ids, held, items.identity[gallery], mates, **how.search)
        self.mate = mates.best
        self.above = mates.of_best(others.above, 0)
        self.other, taken = others.cosine.copy(), np.where(others.row >= 0, gallery[others.row], -1)
        self.sizes: dict[int, NDArray[np.bool_]] = {}
        """Number of distractors → whether each probe's mate is the first."""
        for start, stop in _parts(len(distractors)):
            part = distractors[start:stop]
            unknown = np.full(len(part), -1, dtype=np.int64)
            more = count_others(queries, ids, items.unit[part], unknown, mates, **how.search)
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
        above += count_others(queries, ids, part, unknown, mates, **how.search).above
        right[stop] = above == 0
    result.counts |= {"probes": len(probes), "distractors": len(distractors), "searches": len(mates.row)}

    def figures(weights: Weights | None) -> dict[str, float]:
        every = np.zeros(len(above), dtype=np.float32)
        first = {n: rank_k(1, every, (~one).astype(np.int64), weights) for n, one in right.items()}
        found = {f"distractors:{n}": rate for n, rate in first.items()}
        found |= {f"rank_1_with_{n}_distractors": rate for n, rate in first.items()}
        return found | {f"rank_{k}": rank_k(k, every, above, weights) for k in RANKS}

    result.add([ids[mates.query]], figures, how)


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

    ids, held_ids = items.identity[queries], items.identity[found]
    asked = items.unit if among_themselves else items.unit[queries]
    held = items.unit if among_themselves else items.unit[found]
    mates = find_mates(asked, ids, held, held_ids, left_out=left_out, **how.search)
    mated = mates.counts > 0
    result.counts |= {"queries": int(mated.sum()), "queries_without_mates": int((~mated).sum()), "gallery": len(found)}
    if not mated.any():
        raise UsageError(f"{result.set}: no query has an image of its identity to find")
    others = count_others(asked, ids, held, held_ids, mates, **how.search)
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

    result.add([ids[mated]], figures, how)
    taken = np.where(others.row >= 0, found[others.row], -1)
    _tell_worst(items, queries, taken, mates.of_best(found[mates.row], -1), others.cosine, mates.best, result)


def _every_pair(items: Items, result: Judgement, how: How) -> None:
    """1:1 by every pair of two images whose identities are known: a threshold is a bin's edge, and never accepts more
    than it may."""
    known = np.flatnonzero(items.identity >= 0)
    same, different = histograms(items.unit[torch.from_numpy(known)], items.identity[known], **how.search)
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
