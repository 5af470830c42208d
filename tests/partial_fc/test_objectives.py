import math
import re
import warnings

import pytest
import torch

from pfc.partial_fc import PartialFC, objectives
from pfc.partial_fc.objectives.state import ObjectiveState
from tests.partial_fc.cases import SETTINGS


@pytest.mark.parametrize(("name", "parameters"), SETTINGS.values(), ids=SETTINGS)
def test_slopes_are_those_of_the_loss(name: str, parameters: dict[str, float]) -> None:
    objective = objectives.build(name, **parameters)
    target = torch.linspace(-0.99, 0.99, 41, dtype=torch.float64).requires_grad_()
    negatives = torch.linspace(0.1, 60.0, 41, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(objective, (target, negatives), eps=1e-6, atol=1e-4)


@pytest.mark.parametrize(("name", "parameters"), SETTINGS.values(), ids=SETTINGS)
def test_the_loss_falls_with_the_target_and_rises_with_the_negatives(name: str, parameters: dict[str, float]) -> None:
    objective = objectives.build(name, **parameters)
    target = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    assert (objective(target, torch.full_like(target, 10.0)).diff() <= 1e-12).all()
    negatives = torch.linspace(0, 80, 1001, dtype=torch.float64)
    assert (objective(torch.zeros_like(negatives), negatives).diff() >= 0).all()


@pytest.mark.parametrize(("name", "parameters"), SETTINGS.values(), ids=SETTINGS)
def test_slopes_are_finite_at_the_ends(name: str, parameters: dict[str, float]) -> None:
    objective = objectives.build(name, **parameters)
    target = torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    negatives = torch.tensor([-torch.inf, 600.0, -torch.inf, 600.0, -torch.inf], dtype=torch.float64)
    if isinstance(objective, objectives.SquaresObjective):
        negatives = torch.zeros(5, dtype=torch.float64)
    negatives.requires_grad_()
    objective(target, negatives).sum().backward()
    assert torch.isfinite(target.grad).all()
    assert torch.isfinite(negatives.grad).all()


def test_the_combined_margin_is_each_margin_when_the_others_are_neutral() -> None:
    target = torch.linspace(-1, 1, 101, dtype=torch.float64)
    negatives = torch.full_like(target, 20.0)
    for combined, single in [
        ({"m1": 1.0}, objectives.Softmax()),
        ({"m3": 0.35}, objectives.CosFace()),
        ({"m2": 0.5}, objectives.ArcFace()),
        ({"m1": 1.35}, objectives.SphereFace()),
    ]:
        expected = single(target, negatives)
        assert torch.allclose(objectives.build("combined", **combined)(target, negatives), expected, atol=1e-6)
    together = objectives.Combined(m1=1.2, m2=0.3, m3=0.2)(target, negatives)
    for part in ({"m1": 1.2, "m2": 0.3}, {"m1": 1.2, "m3": 0.2}, {"m2": 0.3, "m3": 0.2}):
        assert not torch.allclose(objectives.build("combined", **part)(target, negatives), together, atol=0.1)


def test_psi_is_the_cosine_continued_without_a_step() -> None:
    theta = torch.linspace(0, 16 * math.pi, 200_001, dtype=torch.float64)
    value = objectives.psi(theta)
    inside = theta <= math.pi
    assert torch.allclose(value[inside], torch.cos(theta[inside]))
    assert (value.diff() <= 1e-12).all()
    assert value.diff().abs().max() < 1e-3


def test_the_pull_of_d_softmax_ends_at_stop() -> None:
    """ε = e^{s·d}: at z_y = d the pull is half of its full strength, a little above it none."""
    objective = objectives.DSoftmax(scale=64.0, stop=0.8)
    target = torch.tensor([0.0, 0.8, 1.0], dtype=torch.float64, requires_grad=True)
    objective.intra(objectives.Numbers(target)).sum().backward()
    assert torch.allclose(target.grad / -64.0, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), atol=1e-5)


def test_the_slope_of_arcface_has_the_factor_of_its_angle() -> None:
    target = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    margin = objectives.psi(objectives.angle(target) + 0.5)
    margin.backward()
    theta = math.acos(0.3)
    assert abs(float(target.grad) - math.sin(theta + 0.5) / math.sin(theta)) < 1e-12


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("cosine", {}, "unknown objective 'cosine'; allowed: softmax, cosface"),
        ("cosface", {"margn": 0.4}, "cosface has no parameter 'margn'; allowed: scale, filter, margin"),
        ("p2sgrad", {"scale": 1.0}, "p2sgrad has no parameter 'scale'; allowed: gram"),
        ("cosface", {"scale": 0}, r"scale must lie in \(0, 256\], found 0"),
        ("cosface", {"scale": math.nan}, r"scale must lie in \(0, 256\], found nan"),
        ("cosface", {"margin": "big"}, "margin must be a number, found 'big'"),
        ("arcface", {"margin": 4.0}, r"margin must lie in \[0, 3.14159\], found 4.0"),
        ("sphereface", {"margin": 0.5}, r"margin must lie in \[1, 16\]"),
        ("combined", {"m3": -1}, r"m3 must lie in \[0, 2\]"),
        ("combined", {"m1": 0}, r"m1 must lie in \(0, 16\], found 0"),
        ("d_softmax", {"stop": 2}, r"stop must lie in \[-1, 1\]"),
    ],
)
def test_wrong_parameters_are_named(name: str, parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objectives.build(name, **parameters)


def test_a_number_may_follow_the_steps() -> None:
    margin = {"start": 0.0, "end": 0.2, "first": 100, "last": 300}
    objective = objectives.build("arcface", margin=margin)
    found = [objective.at(step).margin for step in (0, 100, 200, 300, 1000)]
    assert found == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.2])
    exponential = objectives.build("softmax", scale={"start": 4.0, "end": 64.0, "last": 2, "shape": "exponential"})
    assert [exponential.at(step).scale for step in range(4)] == pytest.approx([4.0, 16.0, 64.0, 64.0])
    annealing = objectives.build(
        "sphereface", margin=4, annealing={"start": 1000, "end": 5, "shape": "inverse", "gamma": 0.12}
    )
    assert [annealing.at(step).annealing for step in (0, 1, 1658, 1659)] == pytest.approx(
        [1000, 1000 / 1.12, 1000 / (1 + 0.12 * 1658), 5]
    )
    fixed = objectives.ArcFace()
    assert fixed.at(7) is fixed


def test_a_head_takes_the_number_of_its_step() -> None:
    moving = objectives.build("cosface", margin={"start": 0.0, "end": 0.4, "last": 2})
    head, embeddings, labels = PartialFC(20, 8, objective=moving), torch.randn(4, 8), torch.arange(4)
    losses = [head(embeddings, labels).item() for _ in range(3)]
    for margin, loss in zip((0.0, 0.2, 0.4), losses, strict=True):
        assert PartialFC(20, 8, objective=objectives.CosFace(margin=margin))(embeddings, labels).item() == loss
    head.eval()
    assert head(embeddings, labels).item() == losses[-1]


@pytest.mark.parametrize(
    ("margin", "message"),
    [
        ({"start": 0.0, "end": 4.0, "last": 10}, "margin must lie in [0, 3.14159], found 4.0"),
        ({"start": 0.0, "last": 10}, "margin needs end"),
        ({"start": 0.0, "end": 0.1, "until": 3}, "margin has no entry 'until'; allowed: start, end, shape"),
        ({"start": 0.0, "end": 0.1}, "margin: shape linear needs last, a step after first (0), found None"),
        ({"start": 0.0, "end": 0.1, "last": 5, "first": 5}, "margin: shape linear needs last"),
        ({"start": 0.0, "end": 0.1, "last": 5.5}, "margin.last must be a step, a whole number, found 5.5"),
        ({"start": "a", "end": 0.1, "last": 5}, "margin.start must be a number, found 'a'"),
        ({"start": 0.0, "end": 0.1, "last": 5, "shape": "cosine"}, "margin: shape must be one of linear, exponential"),
        (
            {"start": 0.0, "end": 0.1, "last": 5, "shape": "exponential"},
            "margin: shape exponential needs start and end",
        ),
        ({"start": 0.1, "end": 0.2, "gamma": 0.1, "shape": "inverse"}, "margin: shape inverse needs 0 ≤ end ≤ start"),
        ({"start": 0.2, "end": 0.1, "shape": "inverse"}, "margin: shape inverse needs gamma above 0, and no last"),
        ({"start": 0.1, "end": 0.2, "last": 5, "gamma": 0.1}, "margin: shape linear has no gamma"),
        ({"start": math.nan, "end": 0.2, "last": 5}, "margin: start and end must be finite"),
    ],
)
def test_wrong_schedules_are_named(margin: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        objectives.build("arcface", margin=margin)


def test_random_margins_are_drawn_from_their_distribution_and_end_in_evaluation() -> None:
    state = ObjectiveState(objectives.ElasticArcFace(), 10, torch.device("cpu"), torch.float32)
    drawn = [_noise(state, step) for step in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert float(drawn[0].mean()) == pytest.approx(0, abs=0.05)
    assert float(drawn[0].std()) == pytest.approx(1, abs=0.05)
    assert not _noise(state, 0, training=False).any()
    elastic = PartialFC(20, 8, objective=objectives.ElasticArcFace(margin=0.4)).eval()
    plain = PartialFC(20, 8, objective=objectives.ArcFace(margin=0.4)).eval()
    embeddings = torch.randn(4, 8)
    assert torch.equal(elastic(embeddings, torch.arange(4)), plain(embeddings, torch.arange(4)))


def _noise(state: ObjectiveState, step: int, *, training: bool = True) -> torch.Tensor:
    objective = objectives.ElasticArcFace()
    return state.numbers(objective, torch.zeros(4000, 2), seed=3, step=step, training=training).noise


def test_averages_move_in_training_alone_and_not_by_what_is_not_finite() -> None:
    head = PartialFC(20, 8, objective=objectives.AdaFace(momentum=0.5))
    mean = head.objective_state.get_buffer("norm_mean")
    head(torch.full((2, 8), torch.nan), torch.arange(2))
    head.eval()
    head(torch.randn(4, 8), torch.arange(4))
    assert float(mean) == 20.0
    head.train()
    embeddings = torch.randn(4, 8)
    head(embeddings, torch.arange(4))
    assert float(mean) == pytest.approx(10.0 + 0.5 * float(embeddings.norm(dim=1).mean()))


def test_embeddings_of_one_length_are_warned_of_once() -> None:
    head = PartialFC(20, 8, objective=objectives.MagFace())
    embeddings = torch.nn.functional.normalize(torch.randn(4, 8)) * 8
    with pytest.warns(UserWarning, match="MagFace sees the embeddings' norms, which hardly differ"):
        head(embeddings, torch.arange(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(embeddings, torch.arange(4))
        PartialFC(20, 8, objective=objectives.MagFace())(torch.randn(4, 8), torch.arange(4))
        PartialFC(20, 8, objective=objectives.ArcFace())(embeddings, torch.arange(4))


def test_the_first_bias_is_where_equal_cosines_balance() -> None:
    """SphereFace2: at cosine 0 the derivative of the loss by the bias is 0."""
    objective = objectives.SphereFace2()
    bias = torch.tensor(objective.first_state(1001)["bias"], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    negatives = 1000 * objectives.softplus(objective.scale * objective.adjusted(zero) + objective.shift({"bias": bias}))
    (slope,) = torch.autograd.grad(objective(zero, negatives, state={"bias": bias}).sum(), bias)
    pull = 0.7 / 40 * torch.sigmoid(-(40 * (objective.adjusted(zero) - 0.4) + bias))
    assert abs(slope.item()) < 1e-3 * pull.item()


@pytest.mark.parametrize("name", ["curricularface", "mv_softmax", "inter_top_k"])
def test_hard_negatives_leave_no_place_for_the_filter(name: str) -> None:
    with pytest.raises(ValueError, match="filter must be null: this objective changes its hard negatives itself"):
        objectives.build(name, filter=0.4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"class_weights must be \[20\], found \[3\]"),
        (torch.full((20,), -1.0), "class_weights must be finite and not negative"),
        (torch.full((20,), torch.nan), "class_weights must be finite and not negative"),
    ],
)
def test_wrong_class_weights_are_refused(weights: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartialFC(20, 8, objective=objectives.CosFace(), class_weights=weights)


def test_a_sub_center_less_than_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sub_centers must lie in \[1, 64\], found 0"):
        PartialFC(20, 8, objective=objectives.CosFace(), sub_centers=0)


def test_a_schedule_stays_in_its_range_to_its_end() -> None:
    with pytest.raises(ValueError, match=r"balance must lie in \(0, 1\), found 1"):
        objectives.build("sphereface2", balance={"start": 0.5, "end": 1, "last": 3})
    with pytest.raises(ValueError, match=r"most_norm must lie in \(200, ∞\), found 110"):
        objectives.build("magface", least_norm={"start": 5, "end": 200, "last": 100})
    assert objectives.build("magface", least_norm={"start": 5, "end": 10, "last": 100}).at(50).least_norm == 7.5


def test_averages_are_used_as_they_have_moved_whatever_the_head_was_cast_to() -> None:
    losses = []
    for cast in (False, True):
        head = PartialFC(20, 8, objective=objectives.AdaFace(momentum=1.0))
        head = head.float() if cast else head
        embeddings = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)[:, None]
        losses.append(head(embeddings, torch.arange(6)).item())
        assert head.objective_state.get_buffer("norm_mean").dtype == torch.float64
    assert losses[0] == losses[1]


@pytest.mark.parametrize("t", [0.2, 1.0])
def test_hard_negatives_with_short_centers_have_finite_gradients(t: float) -> None:
    head = PartialFC(10, 4, objective=objectives.MVSoftmax(t=t))
    head.weight.data.copy_(torch.randn(10, 4) * 1e-6)
    embeddings = (head.weight.detach() * 1e6).requires_grad_()
    head(embeddings, torch.arange(10).roll(1)).backward()
    assert torch.isfinite(head.gradient_scale.grad)
    assert torch.isfinite(embeddings.grad).all()


def test_a_state_of_another_objective_is_not_taken_for_this_ones() -> None:
    heads = [PartialFC(20, 8, objective=objectives.build(name)) for name in ("sphereface2", "uniface")]
    with pytest.raises(RuntimeError, match=r"objective_state\.threshold"):
        heads[1].load_state_dict(heads[0].state_dict())
    heads[1].load_state_dict(heads[1].state_dict())
