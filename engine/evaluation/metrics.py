"""Verification metrics: how well the cosine tells pairs of one identity from pairs of two."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...data.errors import UsageError

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

    from sklearn.metrics import roc_auc_score  # slow to import: only evaluation pays for it

    return VerificationMetrics(
        accuracy=float(np.mean(accuracies)),
        accuracy_std=float(np.std(accuracies)),
        threshold=float(np.mean(thresholds)),
        auc=float(roc_auc_score(same, scores)),
        eer=_equal_error_rate(scores, same),
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
    scores: NDArray[np.float64], same: NDArray[np.bool_], levels: tuple[float, ...] = FAR_LEVELS
) -> dict[float, float]:
    """{rate: share of the positives accepted by a threshold that accepts at most ``rate`` of the negatives}.

    A rate below 1/negatives cannot be measured and is left out.
    """
    negatives = np.sort(scores[~same])[::-1]
    positives = scores[same]
    rates = {}
    for level in levels:
        allowed = int(level * len(negatives) + 1e-9)  # 1e-9: 0.01 · 700 is a little off 7 in floating point
        if allowed >= 1:
            rates[level] = float(np.mean(positives > negatives[allowed]))
    return rates


def _equal_error_rate(scores: NDArray[np.float64], same: NDArray[np.bool_]) -> float:
    from sklearn.metrics import roc_curve

    false_accepts, true_accepts, _ = roc_curve(same, scores, drop_intermediate=False)
    # Along the curve fa - fr rises from -1 to 1; where it crosses 0 between two points, the line between them decides.
    return float(np.interp(0.0, false_accepts - (1 - true_accepts), false_accepts))
