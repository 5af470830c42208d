"""Every figure against its definition, spelt out query by query; on data with and without equal cosines."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from pfc.benchmarks.ranks import OwnMemory
from pfc.data.errors import UsageError
from pfc.data.protocols.table import ROLES, Pairs, Protocol
from pfc.engine.evaluation.items import identities_of, items_of
from pfc.engine.evaluation.judgement import How
from pfc.engine.evaluation.metrics import power_of_ten
from pfc.engine.evaluation.protocol import judge
from pfc.engine.evaluation.search import find_mates, nearest
from pfc.engine.evaluation.templates import cosines_of, pool
from tests.ranks import run_ranks

SMALL = How(memory=20_000, samples=0)  # several blocks both ways


def embeddings_of(kind, number, seed):
    """Cosines without equals; or multiples of ¼, most of them equal to others'."""
    random = np.random.default_rng(seed)
    if kind == "ties":
        return torch.from_numpy(random.choice([-0.5, 0.5], (number, 4)).astype(np.float32))
    return torch.from_numpy(random.normal(size=(number, 16)).astype(np.float32)) + 0.3


def protocol_of(number, identities, roles=("",), seed=0, **columns):
    random = np.random.default_rng(seed)
    role = random.choice([ROLES.index(one) for one in roles], number).astype(np.int64)
    identity = random.integers(0, identities, number).astype(np.int64)
    identity[role == ROLES.index("distractor")] = -1
    columns = {name: random.integers(0, most, number).astype(np.int64) for name, most in columns.items()}
    return Protocol("made", Path(), [f"{i}.png" for i in range(number)], identity, role, **columns)


def cosines(embeddings):
    unit = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)
    return (unit @ unit.T).float().numpy()  # equal ones stay equal


def ordered(cosine, query, rows, identity):
    """The rows as a search returns them; of equal cosines the others first."""
    return sorted(rows, key=lambda row: (-cosine[query, row], identity[row] == identity[query]))


def places(cosine, query, rows, identity):
    found = ordered(cosine, query, rows, identity)
    return [place for place, row in enumerate(found, 1) if identity[row] == identity[query] >= 0]


def retrieval_by_hand(cosine, identity, queries, gallery, left_out):
    figures = {}
    for query in queries:
        rows = [row for row in gallery if not left_out(query, row)]
        found = places(cosine, query, rows, identity)
        if not found:
            continue
        number = len(found)
        precision = [(at, rank / at) for rank, at in enumerate(found, 1)]
        values = {f"at_{k}": found[0] <= k for k in (1, 5, 10, 20, 100)}
        values["map"] = np.mean([value for _, value in precision])
        values["map_at_r"] = sum(value for at, value in precision if at <= number) / number
        values["r_precision"] = sum(at <= number for at in found) / number
        values["minp"] = number / found[-1]
        for name, value in values.items():
            figures.setdefault(name, []).append(float(value))
    return {name: np.mean(values) for name, values in figures.items()}


@pytest.mark.parametrize("kind", ["distinct", "ties"])
@pytest.mark.parametrize("seed", range(3))
def test_each_image_among_all_others(kind, seed):
    protocol = protocol_of(61, 9, seed=seed)
    protocol.identity[:4] = [100, 101, -1, -1]  # alone, alone, unknown twice
    embeddings = embeddings_of(kind, 61, seed)
    cosine, every = cosines(embeddings), range(61)
    figures = judge(protocol, embeddings, SMALL).figures
    by_hand = retrieval_by_hand(cosine, protocol.identity, every, every, lambda query, row: query == row)
    for name, other in (
        ("recall_at_1", "at_1"),
        ("recall_at_10", "at_10"),
        *[(x, x) for x in ("map", "map_at_r", "r_precision")],
    ):
        assert figures[name] == pytest.approx(by_hand[other], abs=1e-12), name

    same, different = [], []
    for i, j in itertools.combinations(every, 2):
        (same if protocol.identity[i] == protocol.identity[j] >= 0 else different).append(cosine[i, j])
    different = np.sort(different)[::-1]
    for level in (1e-1, 1e-2, 1e-3):
        allowed = int(level * len(different))
        threshold = different[allowed] + 1e-5  # a bin's width
        rate = np.mean(np.array(same) > threshold)
        assert figures[f"tar_at_far_{power_of_ten(level)}"] == pytest.approx(rate, abs=1.1 / len(same)), level


@pytest.mark.parametrize("kind", ["distinct", "ties"])
@pytest.mark.parametrize("cameras", [0, 1, 3])
def test_reidentification_leaves_out_what_the_same_camera_took(kind, cameras):
    columns = {"camera": cameras} if cameras else {}
    protocol = protocol_of(80, 6, ("query", "gallery", "gallery", "distractor"), seed=4, **columns)
    embeddings = embeddings_of(kind, 80, 5)
    role, identity, camera = protocol.role, protocol.identity, protocol.camera
    queries = np.flatnonzero(role == ROLES.index("query"))
    gallery = np.flatnonzero((role == ROLES.index("gallery")) | (role == ROLES.index("distractor")))

    def left_out(query, row):
        return camera is not None and identity[query] == identity[row] and camera[query] == camera[row]

    by_hand = retrieval_by_hand(cosines(embeddings), identity, queries, gallery, left_out)
    if not by_hand:  # one camera alone: nothing is left to find
        with pytest.raises(UsageError, match="no query has an image of its identity to find"):
            judge(protocol, embeddings, SMALL)
        return
    figures = judge(protocol, embeddings, SMALL).figures
    assert figures["cmc_1"] == pytest.approx(by_hand["at_1"], abs=1e-12)
    assert figures["cmc_5"] == pytest.approx(by_hand["at_5"], abs=1e-12)
    assert figures["map"] == pytest.approx(by_hand["map"], abs=1e-12)
    assert figures["minp"] == pytest.approx(by_hand["minp"], abs=1e-12)


def identification_by_hand(cosine, identity, probes, gallery, level):
    """rank-1, rank-5 and TPIR of one gallery, from the definitions."""
    mated, impostors = [], []
    for probe in probes:
        found = ordered(cosine, probe, gallery, identity)
        at = places(cosine, probe, gallery, identity)
        first = cosine[probe, found[0]]
        (mated.append((at[0], first)) if at else impostors.append(first))
    impostors = sorted(impostors, reverse=True)
    threshold = impostors[int(level * len(impostors) + 1e-9)]
    hits = [at == 1 and first > threshold for at, first in mated]
    return np.mean([at <= 1 for at, _ in mated]), np.mean([at <= 5 for at, _ in mated]), np.mean(hits)


@pytest.mark.parametrize("kind", ["distinct", "ties"])
def test_identification_searches_the_galleries_apart(kind):
    protocol = protocol_of(150, 30, ("probe", "gallery", "distractor"), seed=6)
    protocol.identity[:3] = -1  # known to nobody
    protocol.gallery = np.where(protocol.role == ROLES.index("gallery"), protocol.identity % 2, -1)
    embeddings = embeddings_of(kind, 150, 7)
    role, cosine = protocol.role, cosines(embeddings)
    probes = np.flatnonzero(role == ROLES.index("probe"))
    distractors = np.flatnonzero(role == ROLES.index("distractor"))
    each = []
    for code in (0, 1):
        gallery = np.concatenate([np.flatnonzero(protocol.gallery == code), distractors])
        each.append(identification_by_hand(cosine, protocol.identity, probes, gallery, 0.1))
    rank_1, rank_5, tpir = np.mean(each, axis=0)
    figures = judge(protocol, embeddings, SMALL).figures
    assert figures["rank_1"] == pytest.approx(rank_1, abs=1e-12)
    assert figures["rank_5"] == pytest.approx(rank_5, abs=1e-12)
    assert figures["tpir_at_fpir_1e-1"] == pytest.approx(tpir, abs=1e-12)
    assert figures[f"rank_1_with_{len(distractors)}_distractors"] == pytest.approx(rank_1, abs=1e-12)


def test_a_threshold_on_impostor_pairs_or_a_joint_gallery_would_say_something_else():
    """By hand: two galleries; probe a is mated in the first, and its best candidate in the second is wrong."""
    embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
    protocol = Protocol(
        "two", Path(), ["a", "b", "probe a"], np.array([0, 1, 0]), np.array([1, 1, 2]), gallery=np.array([0, 1, -1])
    )
    result = judge(protocol, embeddings, SMALL)
    assert result.counts["mated_probes"] == 1
    assert result.counts["non_mated_probes"] == 1  # in the gallery that has b alone; in a joint one there were none
    assert result.figures["rank_1"] == 1  # in a joint one b would be taken for a


def test_distractors_count_in_their_order():
    """By hand: the third of three distractors is nearer than the mate."""
    embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.0, -1.0], [0.9, 0.1]])
    roles = [ROLES.index(one) for one in ("probe", "gallery", "distractor", "distractor", "distractor")]
    protocol = Protocol("d", Path(), list("abcde"), np.array([0, 0, -1, -1, -1]), np.array(roles))
    figures = judge(protocol, embeddings, SMALL).figures
    assert figures["rank_1"] == 0
    assert figures["rank_5"] == 1
    assert figures["rank_1_with_3_distractors"] == 0


@pytest.mark.parametrize("kind", ["distinct", "ties"])
def test_probes_among_distractors_alone(kind):
    protocol = protocol_of(90, 8, ("probe", "distractor", "distractor"), seed=8)
    embeddings = embeddings_of(kind, 90, 9)
    cosine, identity = cosines(embeddings), protocol.identity
    probes = np.flatnonzero(protocol.role == ROLES.index("probe"))
    distractors = np.flatnonzero(protocol.role == ROLES.index("distractor"))
    for number in (10, len(distractors)):
        right = [
            cosine[one, mate] > cosine[one, distractors[:number]].max()
            for one, mate in itertools.permutations(probes, 2)
            if identity[one] == identity[mate]
        ]
        figures = judge(protocol, embeddings, SMALL).figures
        assert figures[f"rank_1_with_{number}_distractors"] == pytest.approx(np.mean(right), abs=1e-12)


def test_templates_are_pooled_by_medium():
    """By hand: two frames of a video count as one image, a weight of 0 takes an image out."""
    embeddings = torch.tensor([[2.0, 0.0], [0.0, 2.0], [3.0, 0.0], [5.0, 5.0]])
    pooled = pool(embeddings, np.array([0, 0, 0, 1]), np.array([7, 7, 3, 7]), np.array([1, 1, 1, 2], np.float32))
    wanted = torch.tensor([[4.0, 1.0], [10.0, 10.0]])
    torch.testing.assert_close(pooled, torch.nn.functional.normalize(wanted, dim=1))
    without = pool(embeddings, np.array([0, 0, 0, 1]), None, np.array([1, 0, 0, 2], np.float32))
    torch.testing.assert_close(without[0], torch.tensor([1.0, 0.0]))
    with pytest.raises(UsageError, match="template number 1 have the weight 0"):
        pool(embeddings, np.array([0, 0, 0, 1]), None, np.array([1, 1, 1, 0], np.float32))


@pytest.mark.parametrize("number", [3, 400, 4000])
def test_cosines_of_few_and_of_many_pairs(number):
    random = np.random.default_rng(15)
    rows = torch.nn.functional.normalize(torch.from_numpy(random.normal(size=(300, 7)).astype(np.float32)), dim=1)
    first, second = random.integers(0, 300, (2, number))
    found = cosines_of(rows, first, second, block=17)
    np.testing.assert_allclose(found, (rows[first] * rows[second]).sum(dim=1), atol=1e-6)


def test_pairs_of_templates():
    protocol = protocol_of(40, 10, seed=10)
    protocol.template = np.repeat(np.arange(20), 2)
    protocol.identity = protocol.template % 5
    embeddings = embeddings_of("distinct", 40, 11)
    first, second = np.triu_indices(20, 1)
    same = first % 5 == second % 5
    protocol.pairs = Pairs(first, second, same)
    result = judge(protocol, embeddings, How(samples=50))
    unit = torch.nn.functional.normalize(embeddings.view(20, 2, -1).sum(dim=1), dim=1)
    cosine = (unit[first] * unit[second]).sum(dim=1).numpy()
    impostors = np.sort(cosine[~same])[::-1]
    rate = np.mean(cosine[same] > impostors[int(0.1 * len(impostors))])
    assert result.figures["tar_at_far_1e-1"] == pytest.approx(rate)
    assert result.counts["impostors_at_far_1e-1"] == int(0.1 * len(impostors))
    assert "tar_at_far_1e-3" not in result.figures  # less than one impostor
    low, high = result.intervals["tar_at_far_1e-1"]
    assert low <= rate <= high
    assert low < high


def pairs_with(cosine, same):
    """A protocol of pairs with these cosines, and its embeddings."""
    embeddings = torch.zeros(2 * len(same), 2)
    embeddings[0::2, 0] = 1
    angle = np.arccos(cosine)
    embeddings[1::2] = torch.tensor(np.stack([np.cos(angle), np.sin(angle)], axis=1), dtype=torch.float32)
    number = len(embeddings)
    protocol = Protocol("p", Path(), [str(i) for i in range(number)], np.arange(number), np.zeros(number, np.int64))
    protocol.pairs = Pairs(np.arange(0, number, 2), np.arange(1, number, 2), np.array(same))
    return protocol, embeddings


def test_a_single_impostor_measures_no_rate():
    result = judge(*pairs_with([0.9, 0.8, 0.3], [True, True, False]), How(samples=5))
    assert result.figures == {"auc": 1, "eer": 0, "min_dcf": 0}
    assert result.counts["impostor_pairs"] == 1


def test_the_detection_cost_weighs_false_alarms_by_the_prior():
    """By hand: from 0.6 on one of two targets is missed, 0.01·½/0.01; below, one false alarm of four costs more."""
    protocol, embeddings = pairs_with([0.8, 0.5, 0.6, 0.1, 0.1, 0.1], [True, True, False, False, False, False])
    assert judge(protocol, embeddings, SMALL).figures["min_dcf"] == pytest.approx(0.5)


def test_one_point_of_the_curve_nearest_to_a_rate_may_exceed_it():
    """By hand: 10 impostors, two of them equal; at FAR 0.1 one may pass, so neither of the two does."""
    cosine = [0.9, 0.9, *[0.1] * 8, 0.95, 0.5]
    same = np.array([False] * 10 + [True] * 2)
    protocol, embeddings = pairs_with(cosine, same)
    assert judge(protocol, embeddings, SMALL).figures["tar_at_far_1e-1"] == 0.5


def judged(kind, roles, samples):
    protocol = protocol_of(97, 12, roles, seed=12)
    result = judge(protocol, embeddings_of(kind, 97, 13), How(memory=20_000, samples=samples))
    return result.figures, result.intervals, result.counts, result.worst


@pytest.mark.parametrize("roles", [("",), ("query", "gallery"), ("probe", "gallery", "distractor")])
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_says_the_same(roles, world_size):
    alone = judged("distinct", roles, 10)
    for figures, intervals, counts, worst in run_ranks(world_size, judged, "distinct", roles, 10):
        assert figures == pytest.approx(alone[0], abs=1e-12)
        assert intervals == alone[1]
        assert counts == alone[2]
        np.testing.assert_allclose(worst, alone[3], atol=1e-6)


@pytest.mark.parametrize("memory", [1, 5_000, 1 << 29])
def test_memory_does_not_change_what_is_found(memory):
    random = torch.Generator().manual_seed(14)
    queries, gallery = (torch.randn(n, 8, generator=random) for n in (30, 200))
    own = np.arange(30, dtype=np.int64)
    cosine, row = nearest(queries, gallery, 7, own=own, memory=memory)
    products = queries @ gallery.T
    products[torch.arange(30), torch.arange(30)] = -torch.inf
    wanted = products.topk(7, dim=1)
    np.testing.assert_array_equal(row, wanted.indices.numpy())
    np.testing.assert_allclose(cosine, wanted.values.numpy(), rtol=1e-5)


def test_identities_that_float32_could_not_tell_apart():
    ids = np.array([2**40, 2**40 + 1, 2**40], dtype=np.int64)
    mates = find_mates(torch.eye(3), ids, torch.eye(3), ids, left_out=lambda query, row: query == row)
    assert mates.counts.tolist() == [1, 0, 1]


def test_what_cannot_be_judged():
    one = protocol_of(6, 1)
    result = judge(one, embeddings_of("distinct", 6, 0), SMALL)  # a single identity: nothing but mates
    assert result.figures["recall_at_1"] == 1
    assert "tar_at_far_1e-1" not in result.figures
    with pytest.raises(UsageError, match="no query has an image of its identity"):
        judge(protocol_of(1, 1), torch.ones(1, 4), SMALL)
    broken = embeddings_of("distinct", 6, 0)
    broken[3, 1], broken[5] = torch.nan, torch.inf
    with pytest.raises(UsageError, match=r"2 of 6 embeddings are not finite, the first is that of 3\.png"):
        judge(one, broken, SMALL)
    with pytest.raises(UsageError, match="5 embeddings for 6 images"):
        judge(one, torch.ones(5, 4), SMALL)
    nobody = protocol_of(8, 3, ("probe", "gallery"))
    nobody.identity[nobody.role == ROLES.index("gallery")] += 10
    with pytest.raises(UsageError, match="no probe has its identity in the gallery"):
        judge(nobody, embeddings_of("distinct", 8, 0), SMALL)


@pytest.mark.parametrize("dim", [2, 64, 128, 512])
@pytest.mark.parametrize("number", [7, 41, 333, 1030])
def test_a_network_that_maps_everything_to_one_point_finds_nothing(dim, number):
    """Equal cosines of products of different shapes differ by their rounding, which must not decide."""
    point = torch.randn(1, dim, generator=torch.Generator().manual_seed(dim)).repeat(number, 1)
    identity = np.arange(number) // 2
    among = Protocol("a", Path(), [str(i) for i in range(number)], identity, np.zeros(number, np.int64))
    figures = judge(among, point, How(samples=0)).figures
    assert figures["recall_at_1"] == (1.0 if number < 3 else 0.0)
    assert all(value == 0 for name, value in figures.items() if name.startswith("tar_at_far"))

    gallery = number // 2
    role = np.where(np.arange(number) < gallery, ROLES.index("gallery"), ROLES.index("probe"))
    identity = np.where(np.arange(number) < gallery, np.arange(number), (np.arange(number) - gallery) * 2)
    search = Protocol("s", Path(), [str(i) for i in range(number)], identity, role)
    figures = judge(search, point, How(samples=0)).figures
    assert figures["rank_1"] == 0
    assert all(value == 0 for name, value in figures.items() if name.startswith("tpir"))

    pairs = among
    first, second = np.triu_indices(min(number, 60), 1)
    pairs.pairs = Pairs(first, second, first // 2 == second // 2)
    figures = judge(pairs, point, How(samples=0)).figures
    assert all(value == 0 for name, value in figures.items() if name.startswith("tar_at_far"))


def test_pairs_of_the_unknown_are_no_impostors():
    protocol = protocol_of(60, 9)
    embeddings = embeddings_of("distinct", 60, 0)
    alone = judge(protocol, embeddings, SMALL)
    unknown = protocol_of(100, 9)
    unknown.identity[:60], unknown.identity[60:] = protocol.identity, -1
    both = judge(unknown, torch.cat([embeddings, embeddings[:40]]), SMALL)
    assert both.counts["impostor_pairs"] == alone.counts["impostor_pairs"]
    assert both.figures["tar_at_far_1e-1"] == alone.figures["tar_at_far_1e-1"]
    assert both.counts["gallery"] == 100  # a search may find them


def test_a_figure_that_is_not_measured_has_no_interval():
    """95 non-mated probes measure no FPIR of 0.01; draws in which they are more than 100 do."""
    random = np.random.default_rng(16)
    role = np.array([1] * 20 + [2] * 20 + [2] * 95)
    identity = np.concatenate([np.arange(20), np.arange(20), 100 + np.arange(95)])
    protocol = Protocol("p", Path(), [str(i) for i in range(135)], identity, role)
    embeddings = torch.from_numpy(random.normal(size=(135, 8)).astype(np.float32))
    result = judge(protocol, embeddings, How(samples=60))
    assert "tpir_at_fpir_1e-1" in result.intervals
    assert set(result.intervals) <= set(result.figures)
    assert not [name for name in result.to_dict() if ":" in name]


def test_templates_that_overflow_are_refused():
    protocol = protocol_of(4, 2)
    protocol.template = np.arange(4)
    protocol.weight = np.full(4, 3e38, np.float32)
    with pytest.raises(UsageError, match="too large for float32"):
        judge(protocol, torch.full((4, 2), 100.0), SMALL)


def test_known_identities_stay_known_where_others_are_not():
    """Items 0 and 1 are one by the table, 2 and 3 by a pair, 3 and 1 by another: all are one; 4 is alone."""
    protocol = protocol_of(5, 1)
    protocol.identity = np.array([7, 7, -1, -1, -1])
    items = items_of(protocol, torch.eye(5))
    ids = identities_of(items, np.array([2, 3, 4]), np.array([3, 1, 0]), np.array([True, True, False]))
    assert len(set(ids[:4])) == 1
    assert ids[4] != ids[0]


@pytest.mark.parametrize("each", [8, 500, 2000])
def test_memory_grows_with_the_mates_alone(each):
    """4,000 images of few or many a identity: besides seventy bytes a mate, what was allowed."""
    identity = np.arange(4000) // each
    embeddings = torch.randn(4000, 32, generator=torch.Generator().manual_seed(each))
    protocol = Protocol("m", Path(), [str(i) for i in range(4000)], identity, np.zeros(4000, np.int64))
    allowed = 16 << 20
    with OwnMemory() as own:
        judge(protocol, embeddings, How(memory=allowed, samples=0))
    assert own.peak < 3 * allowed + 70 * 4000 * each
