"""``pfc plan``: its bytes are those of real tensors, its limits are limits, and it says when something does not fit."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pfc.benchmarks.plan import cases, here
from pfc.benchmarks.plan import verify as verification
from pfc.benchmarks.ranks import Rank
from pfc.data.errors import UsageError
from pfc.engine.backbones import build_backbone
from pfc.engine.config import parse_config
from pfc.engine.plan.backbone import BackboneCost, dry_run
from pfc.engine.plan.limits import Plan, advice, largest_classes, largest_rate, options
from pfc.engine.plan.machine import GB, Machine, card_machine
from pfc.engine.plan.memory import head_memory
from pfc.engine.plan.report import plot
from pfc.engine.plan.setup import Setup
from pfc.launch.cli import main
from pfc.partial_fc import PartialFC, RowAdagrad, RowAdamW, RowOptimizer, RowSGD, objectives

CPU = Machine("a CPU", False, 0, 64 * GB, {"float32": 1e11}, 1e10, 5e9, per_node=2)
CARD = card_machine("v100-32")
NOTHING = BackboneCost(0, 0, 0, 0, 0, 0, {})
CONFIG = """
data: {train: nowhere, batch_size: 8, image_size: [32, 32]}
backbone: {name: small, embedding_dim: 16}
head: {sample_rate: 0.1}
schedule: {steps: 10}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(CONFIG, encoding="utf-8")
    return str(tmp_path / "run.yaml")


def made(**keys: Any) -> Setup:
    return Setup(**{"classes": 10**7, "dim": 512, "batch": 64, "ranks": 8, "rate": 0.1, **keys})


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        (lambda head: RowSGD(head, 0.1, momentum=0.9), {"momentum": 16}),
        (RowAdagrad, {"sum": 1}),
        (RowAdamW, {"first_moment": 16, "second_moment": 16, "steps": 1}),
    ],
)
def test_bytes_of_centers_state_and_kept_probabilities_are_those_of_a_real_head(
    optimizer: Any, state: dict[str, int]
) -> None:
    head = PartialFC(1000, 16, objective=objectives.CosFace())
    rows: RowOptimizer = optimizer(head)
    head(torch.randn(8, 16, requires_grad=True), torch.arange(8)).backward()
    kept = head.budget._given[0]()
    memory = head_memory(Setup(1000, 16, batch=8, ranks=1, state=state), CPU)
    assert memory.centers == head.weight.nbytes
    assert memory.state == sum(tensor.to_local().nbytes for tensor in rows.state_dict()["state"].values())
    assert kept is not None
    assert memory.kept == kept.nbytes


def test_probabilities_that_are_too_many_are_not_kept() -> None:
    few, many = (head_memory(Setup(1000, 16, 8, 1, keep=keep), CPU) for keep in (1000 * 8 * 4, 1000 * 8 * 4 - 1))
    assert few.kept == 1000 * 8 * 4
    assert many.kept == 0


def test_the_dry_run_keeps_what_a_real_forward_pass_keeps() -> None:
    tree = {"data": {"train": "nowhere", "batch_size": 4}, "schedule": {"steps": 1}}
    cost = dry_run(parse_config({**tree, "backbone": {"name": "mobilefacenet", "embedding_dim": 64}}), (48, 32))
    network = build_backbone("mobilefacenet", embedding_dim=64, image_size=(48, 32))
    images = torch.randn(4, 3, 48, 32)
    not_made = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers(), images)}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_made:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(images)
    assert cost.activations == pytest.approx(sum(saved.values()), rel=0.03)
    assert cost.parameters == sum(4 * one.numel() for one in network.parameters() if one.requires_grad)
    assert cost.peak > cost.activations


@pytest.mark.parametrize("name", ["vit_t", "timm/vit_tiny_patch16_224"])
def test_transformers_can_be_planned_and_recomputed_ones_keep_less(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    tree = {"data": {"train": "nowhere", "batch_size": 4}, "schedule": {"steps": 1}}
    backbone = {"name": name, "embedding_dim": 64, "options": {"drop_path" + "_rate" * name.startswith("timm"): 0.1}}
    plain, less, averaged = (
        dry_run(parse_config({**tree, "backbone": {**backbone, **more}}), (64, 48))
        for more in ({}, {"recompute": True}, {"ema": 0.99})
    )
    assert less.activations < 0.4 * plain.activations
    assert less.flops == plain.flops
    assert (plain.backward, less.backward) == (2, 3)
    frozen = {"optimizer": {"groups": [{"frozen_until": "end"}]}}
    still = dry_run(parse_config({**tree, **frozen, "backbone": backbone}), (64, 48))
    assert (still.parameters, still.state, still.backward) == (0, 0, 0)
    assert still.activations < 0.1 * plain.activations
    assert averaged.average == plain.other + plain.parameters
    assert (less.parameters, averaged.activations) == (plain.parameters, plain.activations)


def test_a_network_that_looks_at_its_numbers_cannot_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "looking_net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, dim, size):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(3 * size[0] * size[1], dim)\n"
        "    def forward(self, x):\n"
        "        return self.fc(x.flatten(1)) if x.sum() > 0 else self.fc(-x.flatten(1))\n"
        "def net(embedding_dim, image_size):\n"
        "    return Net(embedding_dim, image_size)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tree = {"data": {"train": "nowhere"}, "schedule": {"steps": 1}, "backbone": {"name": "looking_net:net"}}
    with pytest.raises(UsageError, match=r"backbone\.name: looking_net:net decides by the numbers in its tensors"):
        dry_run(parse_config(tree), (8, 8))


@pytest.mark.parametrize("storage", ["device", "host"])
@pytest.mark.parametrize("keep", [None, 1 << 24])
def test_the_largest_number_of_identities_is_the_largest(storage: Any, keep: int | None) -> None:
    plan = Plan(made(storage=storage, keep=keep, state={"momentum": 512}), CARD, NOTHING)
    most = largest_classes(plan)
    assert plan.of(classes=most).fits
    assert not any(plan.of(classes=more).fits for more in (most + 1, most + most // 100, 2 * most, 100 * most))


def test_a_file_has_no_more_rows_than_the_disk_has_room() -> None:
    machine = replace(CPU, disk_space=10 * GB)
    plan = Plan(made(storage="file", ranks=2, state={"momentum": 512}), machine, NOTHING)
    assert largest_classes(plan) == 10 * GB // 4096
    assert not plan.fits
    assert "GB of the 10.0 GB that the disk has" in advice(plan, options(plan))[0]


def test_the_largest_rate_is_the_largest() -> None:
    plan = Plan(made(classes=3 * 10**7, keep=10**12, batch=512), replace(CARD, memory=14 * GB), NOTHING)
    most = largest_rate(plan)
    assert 0 < most < 1
    assert plan.of(rate=most).fits
    assert not any(plan.of(rate=min(1.0, most * more)).fits for more in (1.0001, 1.1, 2, 100))


def test_where_nothing_fits_the_limits_are_nought() -> None:
    plan = Plan(made(), replace(CARD, memory=GB), NOTHING)
    assert largest_classes(plan) == 0
    assert largest_rate(plan) == 0.0


def test_exchanged_bytes_are_those_of_the_tensors() -> None:
    plan = Plan(made(), CARD, replace(NOTHING, parameters=1000))
    sizes = {one.name: one.bytes for one in plan.collectives}
    assert sizes == {
        "embeddings and labels": 512 * (512 * 4 + 8),
        "numbers of each sample": 512 * 2 * 8,
        "gradients of embeddings": 8 * (64 * 512 + 1) * 4,
        "gradients of the backbone": 1000,
    }
    assert all(one.bytes == 0 or one.sent > 0 for one in plan.collectives)
    assert all(one.sent == one.seconds == 0 for one in plan.of(ranks=1).collectives)


def test_json_is_complete_without_data_or_gpu(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--card", "h100-80", "--world", "64", "--classes", "1000000", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["setup"]["classes"] == 10**6
    assert told["setup"]["centers_per_rank"] == 15625
    parts = told["memory"]["per_rank"]
    assert {"centers", "row state", "sampled rows", "kept probabilities", "activations", "buffers"} <= parts.keys()
    assert sum(part["device"] for part in parts.values()) == told["memory"]["per_rank_total"]["device"]
    assert told["memory"]["all_ranks_total"]["device"] == 64 * told["memory"]["per_rank_total"]["device"]
    assert [one["kind"] for one in told["collectives"]] == ["all_gather", "all_reduce", "reduce_scatter", "all_reduce"]
    assert told["step_seconds"] >= max(phase["seconds"] for phase in told["phases"])
    assert told["fits"] is True
    assert told["largest_classes"] > 10**6
    assert told["largest_rate"] == 1.0
    assert {way["storage"] for way in told["options"]} == {"device", "host", "file"}
    assert told["advice"]


def test_a_configuration_that_does_not_fit_is_told_what_would(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", config, "--card", "rtx-4090", "--classes", "2000000000", "backbone.embedding_dim=128"]
    assert main(arguments) == 1
    told = capsys.readouterr().out
    assert "DOES NOT FIT" in told
    found = re.search(r"→ does not fit: ([\d.]+) GB of a GPU's 24\.0 GB", told)
    assert found is not None
    assert 256 < float(found[1]) < 260  # 250 million rows of 128 float32 numbers and as many of momentum are 256 GB
    assert "→ fits, the fastest: head.storage=" in told
    assert "→ fits on 128 ranks" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--card", "b9000"], "--card b9000: known are v100-32, "),
        (["--card", "h200"], "how many identities? Give --classes N"),
        (["--card", "h200", "--classes", "9", "--plot", "a.gif"], "--plot a.gif: must end in"),
        (["--card", "h200", "head.rate=0.1"], "head.rate: unknown key"),
    ],
)
def test_wrong_use_is_one_line(
    config: str, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main(["plan", config, *arguments]) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    plot(Plan(made(), CARD, NOTHING), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_predictions_are_compared_with_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.head_case(400_000, 64, 0.1, "device", "float32", "row_sgd", 1)
    monkeypatch.setattr(verification, "CASES", (case,))
    for module in (here, verification):  # a process of its own would import torch once more
        monkeypatch.setattr(module, "run", lambda work, _, __, *given: [work(Rank(0, 1, torch.device("cpu")), *given)])
    monkeypatch.setattr(here, "_SIDE", 64)
    monkeypatch.setattr(here, "_NUMBERS", 1 << 16)
    monkeypatch.setattr(here, "_IMAGES", 1)
    (check,) = verification.verify(lambda *_: None)
    assert check.memory_ratio == pytest.approx(1, abs=0.3)
    assert check.seconds > 0
    assert check.measured_seconds > 0


def test_an_unknown_card_names_the_known() -> None:
    with pytest.raises(UsageError, match="a100-80"):
        card_machine("a100")
