"""What the pages say, run: their code, their configurations, their tables, their figures and their links."""

import dataclasses
import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pfc.engine.config import parse_config
from pfc.partial_fc import PartialFC, objectives
from pfc.partial_fc.kernels.gram import pays
from pfc.partial_fc.objectives import Objective

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("objectives.md", "sampling.md")


@pytest.fixture
def own_register(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(objectives, "_BY_NAME", dict(objectives._BY_NAME))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def run_page(page: str) -> dict[str, Any]:
    """The page's python blocks, one after the other in one namespace, which is returned."""
    namespace: dict[str, Any] = {"__name__": "page"}
    torch.manual_seed(1234)
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)
    return namespace


def table(page: str, header: str) -> list[list[str]]:
    """The cells of the table that begins with this header line, without it."""
    lines = (DOCS / page).read_text(encoding="utf-8").split("\n")
    start = next(place for place, line in enumerate(lines) if line.startswith(header)) + 2
    stop = next(place for place, line in enumerate(lines) if place > start and not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:stop]]


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, DOCS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What the pages' code does


@pytest.mark.usefixtures("own_register")
def test_the_added_objective_is_its_formula() -> None:
    page = run_page("objectives.md")
    focal = page["Focal"](scale=16.0)
    torch.manual_seed(1)
    cosines = torch.rand(20, 50, dtype=torch.float64).mul(1.8).sub(0.9).requires_grad_()
    labels = torch.arange(20)
    probability = torch.softmax(16.0 * cosines, dim=1)[torch.arange(20), labels]
    expected = -((1 - probability) ** 2) * probability.log()
    (expected_gradient,) = torch.autograd.grad(expected.sum(), cosines)

    target = cosines[torch.arange(20), labels]
    others = cosines.masked_fill(torch.nn.functional.one_hot(labels, 50).bool(), -torch.inf)
    loss = focal(target, torch.logsumexp(16.0 * others, dim=1))
    (gradient,) = torch.autograd.grad(loss.sum(), cosines)
    assert torch.allclose(loss, expected, rtol=1e-9)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-7, atol=1e-12)

    nothing = torch.tensor([-torch.inf], dtype=torch.float64, requires_grad=True)
    focal(torch.zeros(1, dtype=torch.float64), nothing).backward()
    assert nothing.grad == 0
    code = blocks("objectives.md", "python")[1]
    assert "class Focal" in code
    assert len([line for line in code.split("\n") if line.strip()]) <= 15


@pytest.mark.usefixtures("own_register")
def test_the_added_objective_that_sees_the_norm_does() -> None:
    (code,) = (block for block in blocks("objectives.md", "python") if "class NormMargin" in block)
    assert len([line for line in code.split("\n") if line.strip()]) <= 15
    objective = run_page("objectives.md")["NormMargin"](scale=16.0)
    embeddings = (torch.randn(6, 8, dtype=torch.float64) * 3).requires_grad_()
    head = PartialFC(20, 8, objective=objective, center_dtype=torch.float64)
    head(embeddings, torch.arange(6)).backward()
    cosines = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(head.weight.detach()).T
    margin = 0.01 * embeddings.norm(dim=1).clamp(0, 40)
    logits = 16.0 * (cosines - margin[:, None] * torch.nn.functional.one_hot(torch.arange(6), 20))
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.arange(6)), embeddings)
    assert torch.allclose(embeddings.grad, expected, rtol=1e-9)


@pytest.mark.usefixtures("own_register")
def test_the_added_objective_trains_a_head() -> None:
    losses = run_page("objectives.md")["losses"]
    assert len(losses) == 5
    assert losses[-1] < 0.9 * losses[0]


def test_the_samples_are_as_large_as_the_page_says() -> None:
    page = run_page("sampling.md")
    assert len(page["places"]) == 16
    assert 1000 <= len(page["classes"]) <= 1032
    assert page["drop"] == pytest.approx(2.29, abs=0.02)
    assert page["head"].sample_rate == 1.0
    assert page["head"].steps == 5
    assert not page["head"].row_gradients


@pytest.mark.usefixtures("own_register")
@pytest.mark.parametrize("page", PAGES)
def test_configurations_are_accepted(page: str) -> None:
    run_page(page)  # registers the page's own objective
    found = [yaml.safe_load(block) for block in blocks(page, "yaml")]
    assert found
    for tree in found:
        config = parse_config({"data": {"train": "somewhere"}, "schedule": {"steps": 10}, **tree})
        config.head.objective.build()


# What the tables say


def test_the_table_of_objectives_is_complete() -> None:
    rows = table("objectives.md", "| name in configurations")
    assert [row[0].strip("`") for row in rows] == objectives.names()
    for row in rows:
        assert type(objectives.build(row[0].strip("`"))).__name__ == row[1].strip("`")


def test_the_table_of_parameters_has_all_of_them_with_their_defaults() -> None:
    stated = {
        (name, row[1].strip("`")): row[2]
        for row in table("objectives.md", "| name | parameter")
        for name in (_with(row[1].strip("`")) if "all" in row[0] else [row[0].strip("`")])
    }
    actual = {
        (name, field.name): getattr(objectives.build(name), field.name)
        for name in objectives.names()
        for field in dataclasses.fields(objectives.build(name))
    }
    assert stated.keys() == actual.keys()
    for (name, parameter), default in actual.items():
        text = stated[name, parameter]
        if (own := re.search(rf"`{name}`: ([\d.]+)", text)) is not None:
            text = own[1]
        word = text.split()[0]
        value = {"null": None, "true": True, "false": False}[word] if word.isalpha() else float(word)
        assert value == default, (name, parameter)


def _with(parameter: str) -> list[str]:
    kinds = {name: dataclasses.fields(objectives.build(name)) for name in objectives.names()}
    return [name for name, fields in kinds.items() if any(field.name == parameter for field in fields)]


def test_the_stated_ranges_are_those_that_are_enforced() -> None:
    bounded = 0
    for row in table("objectives.md", "| name | parameter"):
        name = "cosface" if "all" in row[0] else row[0].strip("`")
        parameter = row[1].strip("`")
        match = re.fullmatch(r"([\[(])(.+), (.+)\]", row[3])
        if match is None:
            continue
        bounded += 1
        known = {"π": math.pi, "π/2": math.pi / 2}
        lowest, highest = (known.get(end) or float(end.replace("−", "-")) for end in match.groups()[1:])
        objectives.build(name, **{parameter: highest})
        objectives.build(name, **{parameter: lowest + (1e-9 if match[1] == "(" else 0)})
        for outside in (highest + 1e-3, lowest - (0 if match[1] == "(" else 1e-3)):
            with pytest.raises(ValueError, match=f"{parameter} must lie in"):
                objectives.build(name, **{parameter: outside})
    assert bounded == 30


CLOSED_FORMS = {
    "softmax": ({"scale": 20.0}, lambda theta: torch.ones_like(theta)),
    "cosface": ({"scale": 20.0}, lambda theta: torch.ones_like(theta)),
    "arcface": ({"scale": 20.0}, lambda theta: torch.sin(theta + 0.5).abs() / torch.sin(theta)),
    "sphereface": (
        {"scale": 20.0, "margin": 1.7, "annealing": 3.0},
        lambda theta: (3 + 1.7 * torch.sin(1.7 * theta).abs() / torch.sin(theta)) / 4,
    ),
    "combined": (
        {"scale": 20.0, "m1": 1.2, "m2": 0.3, "m3": 0.1},
        lambda theta: 1.2 * torch.sin(1.2 * theta + 0.3).abs() / torch.sin(theta),
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_slopes_of_coupled_objectives_are_the_stated_ones(name: str) -> None:
    parameters, slope = CLOSED_FORMS[name]
    loss, pull, push = _slopes(objectives.build(name, **parameters))
    probability = 1 - torch.exp(-loss)  # loss = softplus(x) and p = σ(x)
    target, _ = _grid()
    assert torch.allclose(push, probability, atol=1e-12)
    assert torch.allclose(pull, 20.0 * probability * slope(torch.acos(target)), rtol=1e-7, atol=1e-9)


def test_slopes_of_separable_objectives_are_the_stated_ones() -> None:
    target, negatives = _grid()
    _, pull, push = _slopes(objectives.DSoftmax(scale=20.0, stop=0.7))
    assert torch.allclose(pull, 20.0 * torch.sigmoid(20.0 * (0.7 - target)))
    assert torch.allclose(push, torch.sigmoid(negatives))
    _, pull, push = _slopes(objectives.P2SGrad())
    assert torch.allclose(pull, 1 - target)
    assert (push == 0.5).all()
    at_one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(objectives.DSoftmax().intra(objectives.Numbers(at_one)), at_one)
    assert float(-slope) == pytest.approx(1.25, abs=0.005)


@pytest.mark.parametrize("name", [*CLOSED_FORMS, "d_softmax"])
def test_without_negatives_only_a_separable_pull_is_left(name: str) -> None:
    target = torch.linspace(-0.9, 0.9, 19, dtype=torch.float64).requires_grad_()
    negatives = torch.full_like(target, -torch.inf).requires_grad_()
    objective = objectives.build(name)
    loss = objective(target, negatives)
    pull, push = torch.autograd.grad(loss.sum(), (target, negatives))
    assert (push == 0).all()
    assert torch.equal(loss, objective.intra(objectives.Numbers(target)))
    assert (pull != 0).all() if name == "d_softmax" else (pull == 0).all()


def test_the_bound_of_the_slope_at_the_ends() -> None:
    target = torch.tensor([-1.0, 1.0], dtype=torch.float64, requires_grad=True)
    loss = objectives.ArcFace(scale=64.0)(target, torch.full((2,), 600.0, dtype=torch.float64))
    (slope,) = torch.autograd.grad(loss.sum(), target)
    assert (-slope).tolist() == pytest.approx([64e4 * math.sin(0.5)] * 2, rel=1e-6)


def test_annealing_ends_at_the_stated_step() -> None:
    (tree,) = (yaml.safe_load(text) for text in blocks("objectives.md", "yaml") if "annealing" in text)
    parameters = tree["head"]["objective"]
    objective = objectives.build(parameters.pop("name"), **parameters)
    assert isinstance(objective, objectives.SphereFace)
    assert objective.at(0).annealing == 1000
    assert objective.at(1658).annealing > 5
    assert objective.at(1659).annealing == 5


def test_the_gram_way_is_taken_from_the_stated_number_of_rows_on() -> None:
    assert not pays(1024, 512, 512)
    assert pays(1024, 512, 513)
    assert pays(342, 512, 10**7)
    assert not pays(341, 512, 10**7)


def test_a_part_of_the_batch_stops_coupled_objectives_and_not_separable_ones() -> None:
    for objective, all_move in ((objectives.CosFace(), False), (objectives.DSoftmax(), True)):
        head = PartialFC(100, 16, objective=objective, batch_rate=0.25)
        embeddings = torch.randn(16, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
        head(embeddings, torch.arange(16)).backward()
        assert head.last_sample is not None
        moved = (embeddings.grad.abs().sum(dim=1) > 0).nonzero()[:, 0]
        assert moved.tolist() == (list(range(16)) if all_move else head.last_sample.batch.tolist())


def _grid() -> tuple[Tensor, Tensor]:
    target = torch.linspace(-0.99, 0.99, 61, dtype=torch.float64)
    negatives = torch.tensor([-3.0, 2.0, 8.0, 15.0], dtype=torch.float64)
    return target.repeat(4), negatives.repeat_interleave(61)


def _slopes(objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    target, negatives = (numbers.requires_grad_() for numbers in _grid())
    loss = objective(target, negatives)
    by_target, push = torch.autograd.grad(loss.sum(), (target, negatives))
    return loss.detach(), -by_target, push


# What the figures show


@pytest.mark.usefixtures("own_register")
def test_every_objective_is_drawn(tmp_path: Path) -> None:
    objectives.register("own", objectives.CosFace)
    files = script("images/plot_objectives.py").main(tmp_path / "images")
    expected = {f"objective-{name}.svg" for name in objectives.names()} | {"objectives-together.svg"}
    assert "objective-own.svg" in expected
    assert {file.name for file in files} == expected
    for file in files:
        assert "</svg>" in file.read_text(encoding="utf-8")
        assert file.stat().st_size < 300_000
    committed = {path.name for path in (DOCS / "images").glob("objective*.svg")}
    assert committed == expected - {"objective-own.svg"}


def test_the_drawn_slopes_are_those_of_the_losses() -> None:
    target, negatives = _grid()
    loss, by_target, push = script("images/plot_objectives.py").slopes(
        objectives.CosFace(scale=20.0), target, negatives
    )
    expected_loss, pull, expected_push = _slopes(objectives.CosFace(scale=20.0))
    assert torch.equal(loss, expected_loss)
    assert torch.equal(-by_target, pull)
    assert torch.equal(push, expected_push)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        assert not file or (DOCS / file).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (DOCS / (file or page)).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], link
    assert max(len(line) for line in text.split("\n")) <= 120


def test_the_tables_of_the_evidence_are_those_of_its_results() -> None:
    tables = script("evidence/tables.py")
    page = (DOCS / "evidence.md").read_text(encoding="utf-8")
    assert tables.filled(page) == page, "python docs/evidence/tables.py"
    shown = re.findall("<!-- table: (.*) -->", page)
    assert sorted(shown) == sorted(path.stem for path in (DOCS / "evidence").glob("*.csv"))
    for name in tables.PICTURES:
        assert f"images/evidence-{name}.svg" in page
        assert "</svg>" in tables.picture(name)


def test_results_of_more_seeds_are_taken_beside_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = script("evidence/tables.py")
    lines = (DOCS / "evidence" / "rates.csv").read_text(encoding="utf-8").splitlines()
    seeds = lines[0].split(",").index("seed")
    more = [line.split(",") for line in lines[1:] if line.split(",")[seeds] == "0"]
    for cells in more:
        cells[seeds] = "77"
    folder = tmp_path / "runs" / "rates"
    folder.mkdir(parents=True)
    extra = [",".join([*cells, "left out"]) for cells in more]
    (folder / "results.csv").write_text("\n".join([f"{lines[0]},unknown", *extra]) + "\n", encoding="utf-8")
    (tmp_path / "runs" / "others").mkdir()
    (tmp_path / "runs" / "others" / "results.csv").write_text("seed\n1\n", encoding="utf-8")
    (tmp_path / "rates.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setattr(tables, "HERE", tmp_path)
    before = tables.rows_of("rates")
    tables.take(tmp_path / "runs")
    after = tables.rows_of("rates")
    assert [row for row in after if row["seed"] != 77] == before
    assert len(after) == len(before) + len(more)
    assert not any("unknown" in row for row in after)
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == ["rates.csv"]
