"""The operating point, against every pair counted by hand."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from pfc.data.errors import UsageError
from pfc.data.pairs.pairs import Pairs as VerificationPairs
from pfc.data.protocols.table import Pairs, Protocol
from pfc.engine.evaluation.judgement import How
from pfc.engine.evaluation.threshold import Compared, explain, operate, score
from tests.ranks import run_ranks

HOW = How(memory=20_000, samples=40)


def set_of(name="made", number=70, identities=11, spread=0.8, seed=0, group=False):
    random = np.random.default_rng(seed)
    identity = random.integers(0, identities, number).astype(np.int64)
    people = random.normal(size=(identities, 8))
    embeddings = torch.from_numpy((people[identity] + spread * random.normal(size=(number, 8))).astype(np.float32))
    protocol = Protocol(name, Path(), [str(i) for i in range(number)], identity, np.zeros(number, np.int64))
    if group:
        protocol.group, protocol.names["group"] = identity % 3 - 1, ["north", "south"]
    return protocol, embeddings


def by_hand(protocol, embeddings, threshold, inside=None):
    """(false matches, impostor pairs, false non-matches, genuine pairs)."""
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    counts = [0, 0, 0, 0]
    for i, j in itertools.combinations(range(len(unit)), 2):
        if inside is not None and not (inside[i] and inside[j]):
            continue
        genuine, accepted = protocol.identity[i] == protocol.identity[j], float(unit[i] @ unit[j]) >= threshold
        counts[2 * genuine] += accepted != genuine
        counts[2 * genuine + 1] += 1
    return counts


def point_of(protocol, embeddings, fmr, threshold=None, how=HOW):
    compared = Compared.of_protocol(protocol, embeddings)
    scores = score(compared, how)
    chosen = scores.threshold(fmr) if threshold is None else threshold
    return chosen, operate(compared, scores, chosen, fmr, how)


@pytest.mark.parametrize("fmr", [0.3, 0.05, 0.001])
def test_every_pair_of_a_table(fmr):
    protocol, embeddings = set_of(group=True)
    threshold, point = point_of(protocol, embeddings, fmr)
    wrong, impostors, missed, genuine = by_hand(protocol, embeddings, threshold)
    assert (point.false_matches, point.scores.different.sum(), point.scores.same.sum()) == (wrong, impostors, genuine)
    assert point.fmr == pytest.approx(wrong / impostors)
    assert point.fnmr == pytest.approx(missed / genuine)
    assert point.fmr <= fmr
    assert (wrong + 2) / impostors > fmr  # a lower one would let more pass (two, where they share a bin)
    for code, name in enumerate(("north", "south")):
        inside = protocol.group == code
        assert point.groups[name] == tuple(by_hand(protocol, embeddings, threshold, inside)[:2])
    for name, value in (("fmr", point.fmr), ("fnmr", point.fnmr)):
        low, high = point.intervals[name]
        assert low <= value <= high


def test_a_list_of_pairs_says_what_every_pair_says():
    protocol, embeddings = set_of(seed=1)
    threshold, point = point_of(protocol, embeddings, 0.05)
    first, second = np.triu_indices(len(protocol), 1)
    protocol.pairs = Pairs(first, second, protocol.identity[first] == protocol.identity[second])
    again, listed = point_of(protocol, embeddings, 0.05)
    assert again == threshold
    assert (listed.fmr, listed.fnmr, listed.false_matches) == (point.fmr, point.fnmr, point.false_matches)
    assert listed.concentration == point.concentration


def test_a_verification_set():
    protocol, embeddings = set_of(seed=2, number=60)
    same = protocol.identity[0::2] == protocol.identity[1::2]
    compared = Compared.of_pairs(VerificationPairs([b""] * 60, same, "pairs"), embeddings)
    scores = score(compared, HOW)
    point = operate(compared, scores, scores.threshold(0.1), 0.1, HOW)
    assert point.scores.different.sum() == (~same).sum()
    assert point.fmr <= 0.1
    with pytest.raises(UsageError, match=r"0\.001 is less than one of \d+ pairs of two identities"):
        scores.threshold(1e-3)


def test_another_set_asks_for_another_threshold_and_the_reason_is_told():
    threshold, chosen = point_of(*set_of("chosen", seed=3), 0.01)
    alike, embeddings = set_of("alike", seed=4)
    shifted = torch.nn.functional.normalize(embeddings, dim=1) + 0.5  # everyone has something in common
    _, other = point_of(alike, shifted, 0.01, threshold)
    assert other.fmr > 5 * chosen.fmr
    told = " ".join(explain(chosen, other, threshold, 0.01))
    assert "identities of alike are more alike on average" in told
    assert f"alike would ask for {other.own_threshold:.4f}" in told


def test_one_person_under_two_names_is_suspected():
    protocol, embeddings = set_of("twins", number=400, identities=40, spread=0.3, seed=5)
    embeddings[protocol.identity <= 1] = embeddings[0].clone()
    _, point = point_of(protocol, embeddings, 0.01, 0.999)
    assert point.concentration > 0.9
    threshold, chosen = point_of(*set_of("chosen", number=400, identities=40, spread=0.3, seed=6), 1e-4)
    assert "one person under two names" in " ".join(explain(chosen, point, threshold, 1e-4))


def rates():
    _, point = point_of(*set_of(seed=7), 0.05)
    return point.fmr, point.fnmr, point.false_matches, point.intervals


def test_three_ranks_say_what_one_says():
    for one in run_ranks(3, rates):
        assert one == rates()


def test_what_has_no_threshold():
    protocol, embeddings = set_of()
    protocol.identity[:] = 0
    with pytest.raises(UsageError, match="no two images are of two identities"):
        point_of(protocol, embeddings, 0.1)
    protocol.identity[:] = -1
    with pytest.raises(UsageError, match="a threshold needs identities, or pairs beside the table"):
        point_of(protocol, embeddings, 0.1)
    embeddings[3] = torch.nan
    with pytest.raises(UsageError, match="1 of 70 embeddings are not finite"):
        point_of(protocol, embeddings, 0.1)


def test_duplicates_under_two_names_leave_no_threshold():
    protocol, embeddings = set_of(seed=8)
    embeddings[protocol.identity <= 2] = embeddings[0].clone()
    with pytest.raises(UsageError, match=r"pairs of two identities have a cosine of 1, more than .* 0\.01 allows"):
        point_of(protocol, embeddings, 0.01)
    _, point = point_of(protocol, embeddings, 0.01, 0.9)
    assert point.own_threshold is None


def test_a_threshold_that_judges_too_many_pairs_wrongly_is_refused(monkeypatch):
    monkeypatch.setattr("pfc.engine.evaluation.threshold._MOST", 100)
    with pytest.raises(UsageError, match=r"judges [\d,]+ pairs wrongly, more than 100: take a smaller rate"):
        point_of(*set_of(seed=9), 0.3)
