import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from pfc.data.errors import UsageError
from pfc.data.pairs.pairs import Pairs
from pfc.engine.backbones import build_backbone
from pfc.engine.evaluation.evaluate import embed_images, evaluate_pairs, verification_metrics
from pfc.engine.evaluation.metrics import best_threshold, true_accept_rates
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SIZE = (16, 16)


def picture(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def noisy_pairs(count=30, seed=0):
    """Identities are random 16×16 pictures; a photograph of one adds noise. Positive and negative pairs in turn."""
    random = np.random.default_rng(seed)
    faces = random.integers(0, 256, (12, 16, 16, 3))

    def photograph(identity):
        return picture(np.clip(faces[identity] + random.normal(0, 60, faces[0].shape), 0, 255).astype(np.uint8))

    same = np.arange(count) % 2 == 0
    images = []
    for pair in same:
        first = random.integers(12)
        second = first if pair else (first + random.integers(1, 12)) % 12
        images += [photograph(first), photograph(second)]
    return Pairs(images=images, same=same, name="noisy")


def small_model(seed=0):
    torch.manual_seed(seed)
    return build_backbone("small", embedding_dim=16, image_size=SIZE, width=8)


def evaluate(model, pairs, batch_size=8):
    return evaluate_pairs(model, pairs, image_size=SIZE, device=CPU, batch_size=batch_size, threads=1)


def test_an_image_of_several_pairs_is_embedded_once():
    pairs, seen = noisy_pairs(40), []
    repeated = Pairs([*pairs.images, *pairs.images], np.tile(pairs.same, 2), "twice")
    model = small_model()
    model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    result, cosines = evaluate(model, repeated)
    assert sum(seen) == 2 * len(set(pairs.images))  # with the mirror images
    expected, once = evaluate(small_model(), pairs)
    assert result.pairs == 2 * expected.pairs
    np.testing.assert_allclose(cosines, np.tile(once, 2), atol=1e-6)


# --- metrics


def test_perfectly_separated_pairs():
    same = np.tile([True, True, False, False], 10)
    metrics = verification_metrics(np.where(same, 0.6, 0.2), same)
    assert metrics.accuracy == 1.0
    assert metrics.accuracy_std == 0.0
    assert metrics.threshold == pytest.approx(0.4)
    assert metrics.auc == 1.0
    assert metrics.eer == 0.0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=25))
def test_the_best_threshold_is_as_good_as_any_possible_one(pairs):
    scores = np.array([score / 4 for score, _ in pairs])
    same = np.array([kind for _, kind in pairs])

    def right(threshold):
        return sum((score >= threshold) == kind for score, kind in zip(scores, same, strict=True))

    assert right(best_threshold(scores, same)) == max(right(cut) for cut in [*scores, 2.0])


def test_accuracy_equals_the_protocol_written_as_plain_loops():
    random = np.random.default_rng(1)
    same = np.tile(np.repeat([True, False], 6), 10)
    scores = random.normal(np.where(same, 0.5, 0.2), 0.2)
    accuracies = []
    for fold in range(10):
        test = range(fold * 12, fold * 12 + 12)
        train = [i for i in range(120) if i not in test]
        threshold = best_threshold(scores[train], same[train])
        accuracies.append(sum((scores[i] >= threshold) == same[i] for i in test) / 12)
    metrics = verification_metrics(scores, same)
    assert metrics.accuracy == pytest.approx(np.mean(accuracies))
    assert metrics.accuracy_std == pytest.approx(np.std(accuracies))
    wins = np.mean(scores[same][:, None] > scores[~same][None, :])  # AUC: a positive outscores a negative
    assert metrics.auc == pytest.approx(wins)


def test_equal_error_rate_of_a_known_overlap():
    same = np.repeat([False, True], 10)
    scores = np.concatenate([np.arange(10), np.arange(10) + 7.5])  # cut between 8 and 8.5: 9 passes, 7.5 does not
    assert verification_metrics(scores, same).eer == pytest.approx(0.1)


def test_true_accept_rate_is_left_out_where_the_negatives_do_not_allow_it():
    negatives, positives = np.arange(1000) / 1000, np.array([0.9985, 0.9895, 0.5, 2.0])
    scores, same = np.concatenate([negatives, positives]), np.repeat([False, True], [1000, 4])
    rates = true_accept_rates(scores, same)
    # 1e-2 lets 10 negatives pass (0.990 to 0.999), 1e-3 one (0.999); 1e-4 would need 10,000 negatives.
    assert rates == {1e-2: 0.75, 1e-3: 0.5}
    assert true_accept_rates(scores, same, (0.009,)) == {0.009: 0.5}


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=300), st.sampled_from([0.1, 0.01]))
def test_true_accept_rate_never_spends_more_false_accepts_than_allowed(pairs, level):
    scores, same = np.array([s for s, _ in pairs], float), np.array([kind for _, kind in pairs])
    if not same.any():
        return
    negatives, positives = scores[~same], scores[same]
    rates = true_accept_rates(scores, same, (level,))
    assert (level in rates) == (len(negatives) * level >= 1)
    if rates:
        allowed = [cut for cut in range(11) if np.sum(negatives >= cut) <= level * len(negatives) + 1e-9]
        assert rates[level] == pytest.approx(max(np.mean(positives >= cut) for cut in allowed))


def test_pairs_of_one_kind_or_too_few_are_refused():
    with pytest.raises(UsageError, match="none of the 20 pairs shows two identities"):
        verification_metrics(np.zeros(20), np.ones(20, dtype=bool))
    with pytest.raises(UsageError, match="9 pairs are too few for 10 folds"):
        verification_metrics(np.zeros(9), np.arange(9) % 2 == 0)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(RuntimeError, match="1 of 20 cosines are not finite, the first at pair 3"):
        verification_metrics(np.where(np.arange(20) == 3, np.nan, 0.5), np.arange(20) % 2 == 0)


# --- embedding and evaluating


def test_a_model_that_keeps_the_pixels_recognises_the_noisy_pictures():
    pairs = noisy_pairs(40)
    result, cosines = evaluate(nn.Flatten(), pairs)
    line = result.to_dict()
    assert (line["set"], line["pairs"], line["accuracy"], line["auc"]) == ("noisy", 40, 1.0, 1.0)
    assert line["accuracy_noflip"] == 1.0
    assert not any(key.startswith("tar_at_far") for key in line)  # 20 negatives do not allow 1e-2
    assert cosines.dtype == np.float32
    assert cosines[pairs.same].min() > line["threshold"] > cosines[~pairs.same].max()


def test_tar_is_in_the_flat_result_where_the_pairs_allow_it():
    result, _ = evaluate(nn.Flatten(), noisy_pairs(200), batch_size=64)
    rates = {key: value for key, value in result.to_dict().items() if key.startswith("tar")}
    assert list(rates) == ["tar_at_far_1e-2"]
    assert 0.5 < rates["tar_at_far_1e-2"] <= 1


def test_flip_adds_the_mirrored_images_embedding():
    images = noisy_pairs(3).images
    options = {"image_size": SIZE, "device": CPU, "batch_size": 4, "threads": 1}
    pixels = embed_images(nn.Flatten(), images, flip=False, **options)
    expected = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in images]).transpose(0, 3, 1, 2)
    torch.testing.assert_close(pixels, torch.from_numpy(expected / 127.5 - 1).float().flatten(1))
    mirrored = pixels.view(-1, 3, *SIZE).flip(3).flatten(1)
    torch.testing.assert_close(embed_images(nn.Flatten(), images, flip=True, **options), pixels + mirrored)


def test_the_model_is_evaluated_in_eval_mode_and_left_as_it_was():
    model = small_model()
    model.layers[1].eval()  # a frozen norm inside a model in training
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, noisy_pairs(12))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class NotFinite(nn.Module):
    def forward(self, images):
        return torch.where(images[:, 0].flatten(1) > 0.99, torch.nan, 1.0)


def test_embeddings_that_are_not_finite_are_an_error_that_says_so():
    with pytest.raises(RuntimeError, match=r"'noisy': the embeddings of \d+ of 24 images are not finite"):
        evaluate(NotFinite(), noisy_pairs(12))


def test_pairs_of_one_kind_are_refused_by_the_sets_name():
    pairs = noisy_pairs(12)
    with pytest.raises(UsageError, match="pairs 'noisy': none of the 12 pairs shows one identity"):
        evaluate(nn.Flatten(), Pairs(images=pairs.images, same=np.zeros(12, dtype=bool), name="noisy"))


# --- ranks


def evaluate_on_a_rank(num_pairs, batch_size, differing_statistics=False):
    """Also wrapped in DDP, whose forward must not be used: ranks have different numbers of batches."""
    import torch.distributed as dist

    model = small_model()
    own = float(dist.get_rank())
    if differing_statistics:
        model.layers[1].running_mean.fill_(own)
    model = nn.parallel.DistributedDataParallel(model) if own >= 0 else model
    if differing_statistics:
        model.module.layers[1].running_mean.fill_(own)
    result, cosines = evaluate(model, noisy_pairs(num_pairs), batch_size)
    kept = model.module.layers[1].running_mean.unique().tolist()
    return result.to_dict(), cosines, kept == [own]


@pytest.mark.parametrize(("num_pairs", "batch_size"), [(30, 8), (11, 16)])
def test_results_are_identical_on_any_number_of_ranks(num_pairs, batch_size):
    (expected, cosines, _), *_ = run_ranks(1, evaluate_on_a_rank, num_pairs, batch_size)
    for world_size in (2, 3):
        for result, rank_cosines, _ in run_ranks(world_size, evaluate_on_a_rank, num_pairs, batch_size):
            assert result == expected
            np.testing.assert_array_equal(rank_cosines, cosines)


class InTheCompanyOfItsBatch(nn.Module):
    """Exaggerates what a matrix product's rounding does: an embedding depends on the batch that it is computed in."""

    def forward(self, images):
        return images.flatten(1) - images.flatten(1).mean(dim=0)


def cosines_in_company():
    return evaluate(InTheCompanyOfItsBatch(), noisy_pairs(30), 8)[1]


def test_every_image_is_computed_in_the_same_batch_on_any_number_of_ranks():
    expected, *_ = run_ranks(1, cosines_in_company)
    for world_size in (2, 3):
        for cosines in run_ranks(world_size, cosines_in_company):
            np.testing.assert_array_equal(cosines, expected)


def test_all_ranks_use_the_batch_norm_statistics_of_rank_zero_and_keep_their_own():
    (_, expected, _), *_ = run_ranks(1, evaluate_on_a_rank, 20, 8, True)
    for _, cosines, kept_own in run_ranks(2, evaluate_on_a_rank, 20, 8, True):
        np.testing.assert_array_equal(cosines, expected)
        assert kept_own


def evaluate_with_a_broken_image():
    pairs = noisy_pairs(16)
    pairs.images[1] = pairs.images[0]  # which is embedded once, and does not move the number that is told
    pairs.images[30] = b"not an image"  # in the last batch, so on the last rank
    try:
        evaluate(small_model(), pairs)
    except UsageError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_image_that_one_rank_cannot_decode_stops_all_ranks(world_size: int):
    for message in run_ranks(world_size, evaluate_with_a_broken_image):
        assert re.match(r"pairs '.*': image 30 cannot be decoded: .*; make the file again without that pair", message)
