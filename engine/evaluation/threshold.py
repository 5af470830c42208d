"""The operating point: a threshold that is chosen on one set, and what it gives on another."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...data.errors import UsageError
from ...data.pairs.pairs import Pairs
from ...data.protocols.table import Protocol
from .every_pair import BINS, bins_of, edges, histograms, mistaken
from .intervals import Weights, over_identities
from .items import check_embeddings, identities_of, items_of
from .judgement import How
from .search import Floats, Ints, unit
from .templates import cosines_of

_MOST = 20_000_000  # pairs that a threshold judges wrongly, of which each is kept for the bootstrap


@dataclass(frozen=True)
class Compared:
    """What is compared with what: every two of n items, or the pairs of a list.

    Attributes:
        name: of the set.
        unit: [n, D], of length 1.
        identity: int64 [n], from 0 on.
        pairs: first and second, int64 [P], and same, bool [P]; None for every two.
        group: int64 [n], −1 where unknown; with ``groups``, their names.
    """

    name: str
    unit: Tensor
    identity: Ints
    pairs: tuple[Ints, Ints, NDArray[np.bool_]] | None = None
    group: Ints | None = None
    groups: list[str] = field(default_factory=list)

    @staticmethod
    def of_pairs(pairs: Pairs, embeddings: Tensor) -> "Compared":
        """A verification set, whose images are of unknown identities: each is its own in the bootstrap."""
        if len(embeddings) != 2 * len(pairs.same):
            raise UsageError(
                f"{len(embeddings):,} embeddings for {len(pairs.same):,} pairs of {pairs.name}: give two of each"
            )
        if not torch.isfinite(embeddings).all():
            raise UsageError(f"{pairs.name}: some embeddings are not finite")
        first = np.arange(0, len(embeddings), 2)
        same = np.asarray(pairs.same, dtype=bool)
        return Compared(pairs.name, unit(embeddings), np.arange(len(embeddings)), (first, first + 1, same))

    @staticmethod
    def of_protocol(protocol: Protocol, embeddings: Tensor) -> "Compared":
        """A table: the pairs beside it, or every two of its images or templates that have an identity."""
        check_embeddings(protocol, embeddings)
        items = items_of(protocol, embeddings)
        group = None if protocol.group is None else protocol.group[items.row]
        groups = protocol.names.get("group", [])
        if protocol.pairs is not None:
            listed = protocol.pairs.first, protocol.pairs.second, protocol.pairs.same
            return Compared(protocol.name, items.unit, identities_of(items, *listed), listed, group, groups)
        known = np.flatnonzero(items.identity >= 0)
        if not len(known):
            raise UsageError(f"{protocol.name}: a threshold needs identities, or pairs beside the table")
        chosen = items.unit[torch.from_numpy(known)]
        return Compared(
            protocol.name, chosen, items.identity[known], None, None if group is None else group[known], groups
        )

    def cosines(self) -> Floats:
        """Of the listed pairs."""
        assert self.pairs is not None
        return cosines_of(self.unit, self.pairs[0], self.pairs[1])


@dataclass(frozen=True)
class Scores:
    """How many pairs of one and of two identities have a cosine in each bin, int64 [BINS]."""

    same: Ints
    different: Ints

    @property
    def false_match_rate(self) -> NDArray[np.float64]:
        """Of the threshold at each bin's lower edge."""
        return np.cumsum(self.different[::-1])[::-1] / self.different.sum()

    @property
    def false_non_match_rate(self) -> NDArray[np.float64]:
        below = np.concatenate([[0], np.cumsum(self.same)[:-1]])
        return below / self.same.sum()

    def threshold(self, fmr: float) -> float:
        """The smallest edge with a false match rate of at most ``fmr``.

        Raises:
            UsageError: that is less than one pair, or too many pairs of two identities have a cosine of 1.
        """
        impostors = int(self.different.sum())
        if fmr * impostors < 1 - 1e-9:
            raise UsageError(
                f"a false match rate of {fmr:g} is less than one of {impostors:,} pairs of two identities: "
                "take a larger set, or a rate that this one can measure"
            )
        place = int(np.searchsorted(-self.false_match_rate, -fmr * (1 + 1e-9)))
        if place == BINS:
            raise UsageError(
                f"{int(self.different[-1]):,} of {impostors:,} pairs of two identities have a cosine of 1, more than a "
                f"false match rate of {fmr:g} allows: no threshold tells them apart; look for images under two names"
            )
        return float(edges()[place])

    def mistakes(self, threshold: float) -> int:
        """How many pairs that threshold judges wrongly, about: to a bin."""
        place = int(np.searchsorted(edges(), threshold))
        return int(self.different[place:].sum() + self.same[:place].sum())

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the cosines of two identities."""
        middles = edges()[:-1] + 1 / BINS
        mean = float(middles @ self.different / self.different.sum())
        return mean, float(((middles - mean) ** 2 @ self.different / self.different.sum()) ** 0.5)


@dataclass
class OperatingPoint:
    """What a threshold gives on one set.

    Attributes:
        name: of the set.
        scores: of its pairs.
        false_matches: impostor pairs that it takes for one identity.
        fmr, fnmr: false match rate, false non-match rate.
        intervals: of both, 95 %, by the bootstrap over identities.
        own_threshold: what this set would ask for; None where it cannot measure the rate.
        concentration: the share of the false matches that the worst hundredth of the identities (at least one) is in.
        groups: name → (false matches, impostor pairs), of pairs within the group.
    """

    name: str
    scores: Scores
    false_matches: int
    fmr: float
    fnmr: float
    intervals: dict[str, tuple[float, float]]
    own_threshold: float | None
    concentration: float
    groups: dict[str, tuple[int, int]]

    def to_dict(self) -> dict[str, Any]:
        mean, deviation = self.scores.moments()
        groups = {
            name: {"false_matches": wrong, "impostor_pairs": of, "fmr": wrong / of if of else None}
            for name, (wrong, of) in self.groups.items()
        }
        return {
            "set": self.name,
            "fmr": self.fmr,
            "fnmr": self.fnmr,
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "false_matches": self.false_matches,
            "impostor_pairs": int(self.scores.different.sum()),
            "genuine_pairs": int(self.scores.same.sum()),
            "own_threshold": self.own_threshold,
            "impostor_mean": mean,
            "impostor_deviation": deviation,
            "false_matches_of_the_worst_identities": self.concentration,
            "groups": groups,
        }


def score(compared: Compared, how: How) -> Scores:
    """Histograms of the cosines; UsageError where there are no pairs of one of the kinds."""
    if compared.pairs is None:
        same, different = histograms(compared.unit, compared.identity, **how.search)
    else:
        places, kinds = bins_of(torch.from_numpy(compared.cosines())).numpy(), compared.pairs[2]
        same, different = (np.bincount(places[chosen], minlength=BINS) for chosen in (kinds, ~kinds))
    for kind, counts in (("one identity", same), ("two identities", different)):
        if not counts.sum():
            raise UsageError(f"{compared.name}: no two images are of {kind}: a threshold needs pairs of both kinds")
    return Scores(same, different)


def operate(compared: Compared, scores: Scores, threshold: float, fmr: float, how: How) -> OperatingPoint:
    """What ``threshold`` gives on a set of which the false match rate ``fmr`` is wanted."""
    identity = compared.identity
    if compared.pairs is None:
        if scores.mistakes(threshold) > _MOST:
            raise UsageError(
                f"{compared.name}: the threshold {threshold:.4f} judges {scores.mistakes(threshold):,} pairs wrongly, "
                f"more than {_MOST:,}: take a smaller rate, or list pairs beside the table"
            )
        first, second = mistaken(compared.unit, identity, threshold, **how.search)
        impostor = identity[first] != identity[second]
    else:
        first, second, same = compared.pairs
        wrong = (compared.cosines() >= threshold) != same
        first, second, impostor = first[wrong], second[wrong], ~same[wrong]
    accepted, rejected = (first[impostor], second[impostor]), first[~impostor]

    def rates(weights: Weights) -> dict[str, float]:
        impostors, genuine = _totals(compared, weights)
        return {
            "fmr": float(weights[accepted[0]] @ weights[accepted[1]] / impostors) if impostors else np.nan,
            "fnmr": float(weights[rejected].sum() / genuine) if genuine else np.nan,
        }

    try:
        own = scores.threshold(fmr)
    except UsageError:
        own = None
    return OperatingPoint(
        compared.name,
        scores,
        false_matches=len(accepted[0]),
        **rates(np.ones(len(identity))),
        intervals=over_identities([identity], rates, samples=how.samples, moved=how.moved),
        own_threshold=own,
        concentration=_concentration(identity[accepted[0]], identity[accepted[1]], len(np.unique(identity))),
        groups=_by_group(compared, *accepted),
    )


def _totals(compared: Compared, weights: Weights) -> tuple[float, float]:
    """Impostor and genuine pairs, where each item counts so often."""
    if compared.pairs is not None:
        first, second, same = compared.pairs
        return float(weights[first[~same]] @ weights[second[~same]]), float(weights[first[same]].sum())
    weight, images = np.bincount(compared.identity, weights), np.bincount(compared.identity)
    # Two draws of one identity are no pair of two, and no genuine pairs beside its own.
    return float((weight.sum() ** 2 - (weight**2).sum()) / 2), float(weight @ np.maximum(images - 1, 0) / 2)


def _concentration(first: Ints, second: Ints, identities: int) -> float:
    if not len(first):
        return 0.0
    names, ends = np.unique(np.concatenate([first, second]), return_inverse=True)
    worst = np.argsort(-np.bincount(ends), kind="stable")[: max(1, identities // 100)]
    return float((np.isin(first, names[worst]) | np.isin(second, names[worst])).mean())


def _by_group(compared: Compared, first: Ints, second: Ints) -> dict[str, tuple[int, int]]:
    """False matches and impostor pairs within each group."""
    if compared.group is None:
        return {}
    found, group = {}, compared.group
    for code, name in enumerate(compared.groups):
        inside = (group == code).astype(np.float64)
        impostors, _ = _totals(compared, inside)
        found[name] = int(inside[first] @ inside[second]), int(impostors)
    return found


def explain(chosen: OperatingPoint, other: OperatingPoint, threshold: float, fmr: float) -> list[str]:
    """Why a threshold gives another rate on another set, in plain lines."""
    told = []
    (mean, deviation), (mean_there, deviation_there) = chosen.scores.moments(), other.scores.moments()
    told.append(
        f"impostors: mean {mean:.3f}, deviation {deviation:.3f} on {chosen.name}; {mean_there:.3f} and "
        f"{deviation_there:.3f} on {other.name}"
    )
    if other.own_threshold is not None:
        told.append(
            f"for {fmr:g}, {other.name} would ask for {other.own_threshold:.4f}, {chosen.name} for {threshold:.4f}"
        )
    low, high = chosen.intervals.get("fmr", (0.0, 1.0))
    low_there, high_there = other.intervals.get("fmr", (0.0, 1.0))
    if low_there <= high and low <= high_there:
        told.append("the intervals overlap: the difference may be chance")
    elif abs(mean_there - mean) > abs(deviation_there - deviation):
        more = "more" if mean_there > mean else "less"
        told.append(f"identities of {other.name} are {more} alike on average: other people, or other images")
    else:
        wider = "wider" if deviation_there > deviation else "narrower"
        told.append(f"cosines of two identities scatter {wider} on {other.name}: other images, or few identities")
    if other.concentration > 0.3 and other.false_matches >= 10:
        told.append(
            f"{100 * other.concentration:.0f} % of its false matches are of the worst hundredth of its identities: "
            "look at them (pfc clean), they may be one person under two names"
        )
    return told
