"""The head against the oracle, on 1, 2 and 3 real ranks; what it takes and refuses."""

import copy
import gc
import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pfc.partial_fc import PartialFC, RowSGD, objectives
from pfc.partial_fc.kernels import KernelSetup
from pfc.partial_fc.kernels import rows as kernel_rows
from pfc.partial_fc.kernels.cosines import SumOfSquares
from pfc.partial_fc.kernels.gram import SumOfSquaresByGram
from pfc.partial_fc.kernels.probabilities import KeepBudget
from tests.partial_fc.cases import (
    OBJECTIVES,
    SETTINGS,
    SHAPES_AND_RATES,
    WORLDS,
    Case,
    check,
    dense_row_gradient,
    relative_error,
    step_on_rank,
    tensors,
)
from tests.ranks import run_ranks


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_loss_and_gradients_are_the_oracles(setting: str, world_size: int, dtype: torch.dtype) -> None:
    name, parameters = SETTINGS[setting]
    check((Case(name, parameters, dtype=dtype, **fields) for fields in SHAPES_AND_RATES), world_size)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting != "p2sgrad"])
@pytest.mark.parametrize("path", ["probabilities recomputed", "plain kernel, at a larger scale"])
def test_every_other_path_is_the_oracles_too(setting: str, world_size: int, path: str) -> None:
    name, parameters = SETTINGS[setting]
    again = path.startswith("probabilities")
    parameters = parameters if again else parameters | {"scale": 100.0}
    keep_bytes = 0 if again else 1 << 30
    dtypes = itertools.cycle((torch.float32, torch.float64, torch.float64))  # three, so that each rate meets both
    check(
        (
            Case(name, parameters, dtype=dtype, keep_bytes=keep_bytes, **fields)
            for fields, dtype in zip(SHAPES_AND_RATES, dtypes, strict=False)
        ),
        world_size,
    )


ANY_CASE = st.builds(
    lambda name, **fields: Case(name, OBJECTIVES[name], dtype=torch.float64, **fields),
    name=st.sampled_from(sorted(OBJECTIVES)),
    num_classes=st.integers(1, 300),
    dim=st.integers(2, 40),
    batch=st.integers(1, 12),
    labels=st.sampled_from(["random", "same", "low"]),
    sample_rate=st.floats(0.001, 1.0),
    batch_rate=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**40),
)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(cases=st.lists(ANY_CASE, min_size=8, max_size=8), world_size=st.sampled_from(WORLDS))
def test_any_shape_rate_seed_and_label_pattern(cases: list[Case], world_size: int) -> None:
    # Where a random angle comes close to 0 or π, arccos loses digits in the oracle and in the head alike.
    check(cases, world_size, tolerance=1e-8)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("gram", [False, True])
def test_both_ways_of_p2sgrad_are_the_oracles(world_size: int, gram: bool) -> None:
    cases = [Case("p2sgrad", {"gram": gram}, dtype=torch.float64, **fields) for fields in SHAPES_AND_RATES]
    check(cases, world_size)


def test_p2sgrad_takes_the_gram_way_where_it_is_cheaper() -> None:
    for batch, kind in ((1024, SumOfSquaresByGram), (64, SumOfSquares)):
        setup = KernelSetup(batch, 128, 5000, torch.float32, KeepBudget(0))
        assert isinstance(objectives.P2SGrad().kernel(setup), kind)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "p2sgrad"])
def test_negatives_above_the_filter_are_left_out(name: str, world_size: int) -> None:
    case = Case(name, OBJECTIVES[name] | {"filter": 0.2}, dim=8, sample_rate=0.6)
    check((case, replace(case, dtype=torch.float64)), world_size)
    plain = step_on_rank(Case(name, OBJECTIVES[name], dim=8)).loss
    filtered = step_on_rank(Case(name, OBJECTIVES[name] | {"filter": 0.2}, dim=8)).loss
    assert filtered < plain


def test_sphereface_annealing_falls_with_the_steps_of_the_head() -> None:
    annealing = objectives.Schedule(10.0, 1.0, "inverse", gamma=0.5)
    objective = objectives.SphereFace(scale=16.0, margin=2.0, annealing=annealing)
    head = PartialFC(20, 8, objective=objective, center_dtype=torch.float64)
    embeddings, labels = torch.randn(4, 8, dtype=torch.float64), torch.arange(4)
    cosines = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(head.weight.detach()).T
    target = cosines[torch.arange(4), labels]
    for step in range(40):
        share = max(1.0, 10.0 / (1 + 0.5 * step))
        mixed = (share * target + objectives.psi(2.0 * torch.acos(target))) / (1 + share)
        logits = cosines.clone()
        logits[torch.arange(4), labels] = mixed
        expected = torch.nn.functional.cross_entropy(16.0 * logits, labels)
        assert head(embeddings, labels).item() == pytest.approx(float(expected), rel=1e-10)


def test_cosface_is_that_of_the_common_implementation() -> None:
    """Its formula, written anew: softmax over s·(z − m·onehot), its cross-entropy clipped at 1e-30, on 2 ranks."""
    case = Case("cosface", {"scale": 64.0, "margin": 0.4}, num_classes=50, dim=128, batch=8)  # below its clip
    results = run_ranks(2, step_on_rank, case)
    embeddings, labels, centers = tensors(case, 2)
    embeddings.requires_grad_()
    centers.requires_grad_()
    cosines = torch.nn.functional.linear(
        torch.nn.functional.normalize(embeddings), torch.nn.functional.normalize(centers)
    ).clamp(-1, 1)
    logits = 64.0 * (cosines - 0.4 * torch.nn.functional.one_hot(labels, 50))
    exponentials = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
    probability = exponentials / exponentials.sum(dim=1, keepdim=True)
    loss = -probability[torch.arange(16), labels].clamp_min(1e-30).log().mean()
    loss.backward()
    assert relative_error(results[0].loss, loss.detach()) < 1e-5
    assert relative_error(torch.cat([result.embedding_grad for result in results]) / 2, embeddings.grad) < 1e-5
    assert relative_error(torch.cat([result.row_grad for result in results]), centers.grad) < 1e-5


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_autocast_around_it_and_labels_in_a_column_change_nothing(precision: torch.dtype, world_size: int) -> None:
    for name, scale in (("cosface", 64.0), ("cosface", 100.0), ("p2sgrad", None)):
        parameters = OBJECTIVES[name] | ({"scale": scale} if scale else {})
        each = itertools.product((1.0, 0.3), (torch.float32, torch.float64))
        cases = (Case(name, parameters, sample_rate=rate, dtype=dtype, surroundings=precision) for rate, dtype in each)
        check(cases, world_size)


def test_it_works_in_inference_mode() -> None:
    head = PartialFC(30, 8, objective=objectives.CosFace())
    embeddings, labels = torch.randn(4, 8), torch.arange(4)
    with torch.inference_mode():
        assert torch.equal(head(embeddings, labels), head(embeddings.clone(), labels))


def test_frozen_centers_keep_nothing() -> None:
    head = PartialFC(30, 8, objective=objectives.CosFace(), sample_rate=0.5).requires_grad_(False)
    embeddings = torch.randn(4, 8, requires_grad=True)
    head(embeddings, torch.arange(4)).backward()
    assert embeddings.grad is not None
    assert embeddings.grad.norm() > 0
    assert not head.row_gradients
    assert head.gradient_scale.grad is None


def test_a_gradient_of_its_gradient_is_refused() -> None:
    head = PartialFC(30, 8, objective=objectives.CosFace())
    embeddings = torch.randn(4, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="without create_graph"):
        torch.autograd.grad(head(embeddings, torch.arange(4)), embeddings, create_graph=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_begins_without_gradients(how: str) -> None:
    head = PartialFC(30, 8, objective=objectives.CosFace(), sample_rate=0.5)
    head(torch.randn(4, 8, requires_grad=True), torch.arange(4)).backward()
    copied = copy.deepcopy(head) if how == "deepcopy" else pickle.loads(pickle.dumps(head))
    assert not copied.row_gradients
    RowSGD(copied, 0.1).step()
    assert torch.equal(copied.weight, head.weight)
    assert len(head.row_gradients) == 1, "the head itself keeps them"
    copied(torch.randn(4, 8, requires_grad=True), torch.arange(4)).backward()


def copied_on_a_rank() -> bool:
    head = PartialFC(30, 8, objective=objectives.CosFace())
    other = copy.deepcopy(head)
    other(torch.randn(4, 8), torch.arange(4))
    return other.exchange is head.exchange


def test_a_copy_is_made_where_ranks_share_the_centers() -> None:
    assert run_ranks(2, copied_on_a_rank) == [True, True]


def test_centers_become_bfloat16_by_their_argument_alone() -> None:
    head = PartialFC(30, 8, objective=objectives.CosFace())
    with pytest.raises(
        ValueError, match=r"are torch\.float32 and cannot become torch\.bfloat16: give PartialFC another"
    ):
        head.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"center_dtype must be float32, float64 or bfloat16, found torch\.float16"):
        PartialFC(30, 8, objective=objectives.CosFace(), center_dtype=torch.float16)
    assert head.double().weight.dtype == torch.float64


def test_a_second_backward_is_refused() -> None:
    for objective in (objectives.CosFace(), objectives.P2SGrad(gram=True), objectives.P2SGrad(gram=False)):
        head = PartialFC(10, 8, objective=objective)
        loss = head(torch.randn(4, 8, requires_grad=True), torch.arange(4))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second time"):
            loss.backward()


def test_the_rate_may_change_between_steps() -> None:
    head = PartialFC(100, 8, objective=objectives.CosFace(), sample_rate=0.1)
    sizes = []
    for rate in (0.1, 0.5, 1.0):
        head.sample_rate = rate
        head(torch.randn(1, 8), torch.tensor([0]))
        sizes.append(len(head.last_sample.classes))
    assert sizes[0] in (10, 11)
    assert sizes[1] in (50, 51)
    assert sizes[2] == 100
    with pytest.raises(ValueError, match=r"sample_rate must lie in \(0, 1\], found 0"):
        head.sample_rate = 0


def test_centers_learn_when_the_embeddings_need_no_gradient() -> None:
    head = PartialFC(10, 8, objective=objectives.CosFace())
    head(torch.randn(4, 8), torch.arange(4)).backward()
    assert dense_row_gradient(head).abs().sum() > 0


def test_gradients_of_several_passes_add_up() -> None:
    torch.manual_seed(0)
    head = PartialFC(50, 8, objective=objectives.DSoftmax(), sample_rate=0.2)
    embeddings, labels = torch.randn(2, 4, 8, requires_grad=True), torch.randint(0, 50, (2, 4))
    each = []
    for part in range(2):
        head(embeddings[part], labels[part]).backward()
        each.append(dense_row_gradient(head))
        head.clear_gradients()
    head.steps = 0
    (head(embeddings[0], labels[0]) + head(embeddings[1], labels[1])).backward()
    assert torch.allclose(dense_row_gradient(head), each[0] + each[1], atol=1e-6)


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_passes_that_wait_for_one_step_share_what_may_be_kept(
    sample_rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward passes without a backward pass count, a loss that is thrown away does not, nor what a step has used."""
    monkeypatch.setattr(kernel_rows, "block_bytes", lambda _: 1)  # the least: 64 rows
    rows = round(500 * sample_rate) + 8 + 1
    head = PartialFC(500, 16, objective=objectives.CosFace(), sample_rate=sample_rate, keep_bytes=2 * 8 * rows * 4)
    optimizer = RowSGD(head, 0.1)

    def loss() -> torch.Tensor:
        return head(torch.randn(8, 16, requires_grad=True), torch.randint(0, 500, (8,)))

    for _ in range(2):
        kept = []
        for _ in range(4):
            loss().backward()
            kept.append(_kept_bytes(8))
        assert 0 < kept[0] < kept[1] == kept[2] == kept[3] <= head.keep_bytes
        optimizer.step()
        optimizer.zero_grad()
        assert _kept_bytes(8) == 0
    losses = [loss() for _ in range(3)]
    assert 0 < _kept_bytes(8) <= head.keep_bytes
    sum(losses).backward()
    assert 0 < _kept_bytes(8) <= head.keep_bytes
    del losses
    head.clear_gradients()
    loss()
    assert _kept_bytes(8) == 0


def _kept_bytes(batch: int) -> int:
    """What all matrices [K, B] that exist take, K ≥ 100."""
    found = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.ndim == 2]
    return sum(one.nbytes for one in found if one.shape[1] == batch and len(one) >= 100)


def test_eval_mode_uses_all_classes_and_does_not_move_the_sampling_on() -> None:
    case = Case("d_softmax", OBJECTIVES["d_softmax"])
    full = step_on_rank(case).loss
    head = PartialFC(
        case.num_classes, case.dim, objective=objectives.DSoftmax(), sample_rate=0.1, batch_rate=0.5, seed=case.seed
    )
    embeddings, labels, centers = tensors(case, 1)
    head.load_centers(centers.float())
    head.eval()
    assert torch.equal(head(embeddings.float(), labels), full)
    assert head.steps == 0


def test_centers_are_not_what_a_seed_of_the_users_draws() -> None:
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, 16))
    rows = torch.nn.functional.normalize(PartialFC(64, 16, objective=objectives.Softmax(), seed=0).weight)
    assert (directions * rows).sum(dim=1).max() < 0.9


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (torch.randn(4, 7), torch.arange(4), r"embeddings must be \[b, 8\]"),
        (torch.randn(0, 8), torch.arange(0), "with b ≥ 1"),
        (torch.randn(4, 8), torch.arange(3), r"labels must be int64 \[4\]"),
        (torch.randn(4, 8), torch.arange(4).int(), "found int32"),
    ],
)
def test_wrong_shapes_and_types_are_named(embeddings: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartialFC(20, 8, objective=objectives.CosFace())(embeddings, labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, found 0"),
        ({"embedding_dim": 0}, "embedding_dim must be at least 1"),
        ({"sample_rate": 0.0}, r"sample_rate must lie in \(0, 1\], found 0.0"),
        ({"batch_rate": 1.5}, r"batch_rate must lie in \(0, 1\], found 1.5"),
        ({"center_dtype": torch.float16}, "center_dtype must be float32, float64 or bfloat16"),
        ({"compute_dtype": torch.float16}, 'compute_dtype must be bfloat16, float32, float64 or "tf32"'),
    ],
)
def test_impossible_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartialFC(**{"num_classes": 20, "embedding_dim": 8, "objective": objectives.CosFace()} | arguments)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_gradients_the_loss_is_the_same(name: str) -> None:
    head = PartialFC(2000, 24, objective=objectives.build(name, **OBJECTIVES[name])).eval()
    embeddings = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(7) * 300
    loss = head(embeddings, labels)
    with torch.no_grad():
        assert torch.equal(head(embeddings, labels), loss.detach())
