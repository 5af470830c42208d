"""Verification metrics: how well the cosine tells pairs of one identity from pairs of two."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...data.errors import UsageError

TIE = 1e-6
"""Cosines that are equal differ by less, by the rounding of products of different shapes."""
FAR_LEVELS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


@dataclass(frozen=True)
class VerificationMetrics:
    """Metrics of one set of pairs; a pair counts as the same identity where its cosine is at least the threshold."""

    accuracy: float
    """Mean over the folds, each judged with the threshold that is best on the other folds."""
    accuracy_std: float
    """Standard deviation of the folds' accuracies."""
    threshold: float
    """Mean of the folds' thresholds."""
    auc: float
    """Area under the ROC curve."""
    eer: float
    """Equal error rate: where false accepts and false rejects are equally frequent."""
    tar_at_far: dict[float, float]
    """False accept rate → true accept rate; only rates that are at least one of the negatives."""


def verification_metrics(
    cosines: NDArray[np.floating], same: NDArray[np.bool_], folds: int = 10
) -> VerificationMetrics:
    """The usual 10-fold protocol of LFW and its followers, and threshold-free measures.

    Folds are contiguous parts of the list, as in the published lists, which hold in turn 300 positives and 300
    negatives ten times. A list in another order should be mixed, so that each fold has both kinds.

    Args:
        cosines: [P] score of each pair.
        same: [P] whether the pair shows one identity.
        folds: number of folds.

    Raises:
        UsageError: fewer pairs than folds, or no positive or no negative pair.
        RuntimeError: a score is not finite.
    """
    scores = np.asarray(cosines, dtype=np.float64)
    same = np.asarray(same, dtype=bool)
    if len(scores) < folds:
        raise UsageError(f"{len(scores)} pairs are too few for {folds} folds: give at least one pair per fold")
    if same.all() or not same.any():
        kind = "two identities" if same.all() else "one identity"
        raise UsageError(f"none of the {len(same)} pairs shows {kind}: verification needs pairs of both kinds")
    if not np.isfinite(scores).all():
        broken = np.flatnonzero(~np.isfinite(scores))
        raise RuntimeError(f"{len(broken)} of {len(scores)} cosines are not finite, the first at pair {broken[0]}")

    accuracies, thresholds = [], []
    for test in np.array_split(np.arange(len(scores)), folds):
        train = np.ones(len(scores), dtype=bool)
        train[test] = False
        threshold = best_threshold(scores[train], same[train])
        thresholds.append(threshold)
        accuracies.append(np.mean((scores[test] >= threshold) == same[test]))

    area, equal = area_and_eer(scores, same)
    return VerificationMetrics(
        accuracy=float(np.mean(accuracies)),
        accuracy_std=float(np.std(accuracies)),
        threshold=float(np.mean(thresholds)),
        auc=area,
        eer=equal,
        tar_at_far=true_accept_rates(scores, same),
    )


def best_threshold(scores: NDArray[np.float64], same: NDArray[np.bool_]) -> float:
    """The threshold with the most right decisions, ``score >= threshold`` meaning the same identity.

    Exact: every way of cutting the sorted scores is tried, not a grid. A cut between two scores lies midway between
    them; of several equally good cuts the middle one is taken.
    """
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order], same[order]
    # Cutting before place i accepts places i, i+1, ...: right are the negatives before i and the positives from i on.
    right = np.concatenate([[0], np.cumsum(~positive)]) + np.concatenate([np.cumsum(positive[::-1])[::-1], [0]])
    cuts = np.concatenate([ordered[:1], (ordered[:-1] + ordered[1:]) / 2, [np.nextafter(ordered[-1], np.inf)]])
    possible = np.concatenate([[True], ordered[:-1] < ordered[1:], [True]])  # equal scores cannot be told apart
    right, cuts = right[possible], cuts[possible]
    best = np.flatnonzero(right == right.max())
    return float(cuts[best[len(best) // 2]])


def true_accept_rates(
    scores: NDArray[np.float64],
    same: NDArray[np.bool_],
    levels: Iterable[float] = FAR_LEVELS,
    weights: NDArray[np.float64] | None = None,
    *,
    ordered: bool = False,
) -> dict[float, float]:
    """{rate: share of the positives accepted by a threshold that accepts at most ``rate`` of the negatives}.

    A rate below 1/negatives cannot be measured and is left out. ``weights`` [P]: how often each pair counts.
    ``ordered``: the scores fall.
    """
    weights = np.ones(len(scores)) if weights is None else weights
    positives, of_positives = scores[same], weights[same]
    total = of_positives.sum()
    thresholds = cuts(scores[~same], weights[~same], levels, ordered=ordered)
    return {level: float((positives > cut) @ of_positives / total) for level, cut in thresholds.items() if total}


def cuts(
    scores: NDArray[np.floating], weights: NDArray[np.float64], levels: Iterable[float], *, ordered: bool = False
) -> dict[float, float]:
    """{level: the smallest of ``scores`` that at most this share of their weight is above, and TIE more: what is to be
    exceeded}; ``ordered``: they fall.

    A level that is less than one of them is left out.
    """
    if not ordered:
        order = np.argsort(-scores, kind="stable")
        scores, weights = scores[order], weights[order]
    sums = np.cumsum(weights)
    found = {}
    for level in levels:
        allowed = level * (sums[-1] if len(sums) else 0) * (1 + 1e-9) + 1e-9  # 0.01 · 700 is a little off 7
        if allowed >= 1:
            # Those before the first that would be too many are above it, unless they have its score: then they are not.
            place = int(np.searchsorted(sums, allowed, side="right"))
            found[level] = float(scores[place]) + TIE if place < len(scores) else -np.inf
    return found


def area_and_eer(scores: NDArray[np.float64], same: NDArray[np.bool_]) -> tuple[float, float]:
    """Area under the ROC curve, and the equal error rate."""
    from sklearn.metrics import auc, roc_curve  # slow to import: only evaluation pays for it

    false_accepts, true_accepts, _ = roc_curve(same, scores, drop_intermediate=False)
    # Along the curve fa - fr rises from -1 to 1; where it crosses 0 between two points, the line between them decides.
    equal = np.interp(0.0, false_accepts - (1 - true_accepts), false_accepts)
    return float(auc(false_accepts, true_accepts)), float(equal)


def minimum_detection_cost(scores: NDArray[np.float64], same: NDArray[np.bool_], prior: float = 0.01) -> float:
    """minDCF: the least prior·P_miss + (1 − prior)·P_false alarm over all thresholds, over the cost of a fixed answer
    (NIST SRE 2010 evaluation plan, section 3, with costs of 1)."""
    from sklearn.metrics import roc_curve

    false_alarms, hits, _ = roc_curve(same, scores, drop_intermediate=False)
    return float((prior * (1 - hits) + (1 - prior) * false_alarms).min() / min(prior, 1 - prior))


def power_of_ten(level: float) -> str:
    """1e-3, as it stands in the names of figures."""
    return f"{level:.0e}".replace("e-0", "e-")
