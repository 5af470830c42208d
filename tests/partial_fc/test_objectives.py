import math

import pytest
import torch

from pfc.partial_fc import objectives
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
    objective.intra(target).sum().backward()
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
