import json
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pfc.data import pack_synthetic
from pfc.data.errors import UsageError
from pfc.engine.checkpoint import find, load_backbone
from pfc.engine.checkpoint.state import changes
from pfc.engine.config import Config, parse_config
from tests.engine.runs import configuration, final_tensors, new_trainer, pack, train, train_on_rank
from tests.ranks import run_ranks

BATCH, BEFORE, AFTER = 12, 8, 13
"""Images of a global batch, of 222 in the set; steps before the change of ranks, in the first epoch, and after it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pack(tmp_path_factory.mktemp("data"))
    _name(folder / "train", [f"person {label}" for label in range(37)])
    return folder


def _name(dataset: Path, names: list[str]) -> None:
    (dataset / "labels.json").write_text(json.dumps(names))


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


def final(world_size: int, config: Config) -> dict[str, Tensor]:
    return run_ranks(world_size, final_tensors, config.model_dump())[0]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_resumed_from_asynchronous_saves_is_the_one_that_never_stopped(
    folder: Path, tmp_path: Path, world_size: int
) -> None:
    changes = {"checkpoint": {"every_steps": 1, "asynchronous": True}, "head": {"sample_rate": 0.4}}
    straight = configuration(folder, tmp_path / "straight", head={"sample_rate": 0.4})
    broken = configuration(folder, tmp_path / "broken", **changes)
    lines = train(world_size, straight)
    train(world_size, broken, steps=3)
    assert losses(train(world_size, broken)) == losses(lines)
    assert_same(final(world_size, straight), final(world_size, broken))


def on(world_size: int, folder: Path, runs: Path, rate: float) -> Config:
    return configuration(
        folder,
        runs,
        data={"batch_size": BATCH // world_size},
        head={"sample_rate": rate},
        schedule={"steps": BEFORE + AFTER},
    )


@cache
def uninterrupted(world_size: int, folder: Path, runs: Path, rate: float) -> list[float]:
    return losses(train(world_size, on(world_size, folder, runs, rate)))


@pytest.mark.parametrize("rate", [1.0, 0.1])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (3, 2)])
def test_a_run_goes_on_on_another_number_of_ranks(
    folder: Path, tmp_path: Path, before: int, after: int, rate: float
) -> None:
    straight = uninterrupted(before, folder, folder / f"straight-{before}-{rate}", rate)
    train(before, on(before, folder, tmp_path, rate), steps=BEFORE)
    moved = on(after, folder, tmp_path, rate)
    assert_same(final(before, on(before, folder, tmp_path, rate)), final(after, moved))
    lines = train(after, moved)
    assert [line["step"] for line in lines] == list(range(1, BEFORE + AFTER + 1))
    assert losses(lines)[:BEFORE] == straight[:BEFORE]
    assert losses(lines)[BEFORE:] == pytest.approx(straight[BEFORE:], rel=1e-4)


@pytest.mark.parametrize(("before", "after"), [("file", "file"), ("device", "host")])
def test_a_run_goes_on_wherever_its_centers_are_stored(folder: Path, tmp_path: Path, before: str, after: str) -> None:
    def stored(runs: str, storage: str) -> Config:
        head = {"sample_rate": 0.3, "storage": storage, "center_dtype": "bf16"}
        return configuration(folder, tmp_path / runs, head=head)

    lines = train(2, stored("straight", "device"))
    train(2, stored("moved", before), steps=4)
    assert losses(train(2, stored("moved", after))) == losses(lines)
    assert_same(final(2, stored("straight", "device")), final(2, stored("moved", after)))


KEEPING = [
    ({"name": "adaface", "scale": 16.0, "momentum": 0.3}, {"norm_mean", "norm_deviation"}),
    ({"name": "uniface", "scale": 16.0, "margin": 0.2}, {"threshold"}),
]


@pytest.mark.parametrize(("objective", "names"), KEEPING, ids=["averages", "a bias"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_an_objective_keeps_comes_back(
    folder: Path, tmp_path: Path, objective: dict[str, Any], names: set[str], optimizer: str
) -> None:
    head = {"objective": objective, "sub_centers": 2, "class_weights": {"frequency": 0.5}, "sample_rate": 0.5}
    optimizers = {"optimizer": {"backbone": {"name": optimizer, "lr": 0.005}}}
    straight = configuration(folder, tmp_path / "straight", head=head, **optimizers)
    broken = configuration(folder, tmp_path / "broken", head=head, **optimizers)
    lines = train(2, straight)
    train(2, broken, steps=3)
    before = final(2, broken)
    assert {f"objective/{name}" for name in names} <= before.keys()
    assert losses(train(2, broken)) == losses(lines)
    after = final(2, broken)
    assert_same(final(2, straight), after)
    for name in names:
        assert not torch.equal(before[f"objective/{name}"], after[f"objective/{name}"]), "and it moves"


def test_a_run_goes_on_with_another_objective(folder: Path, tmp_path: Path) -> None:
    train(1, configuration(folder, tmp_path), steps=4)
    for objective in ("uniface", "curricularface", "cosface"):
        changed = configuration(folder, tmp_path, head={"objective": {"name": objective, "scale": 16.0}})
        (told,) = run_ranks(1, _told, changed.model_dump())
        assert "changed    head.objective: " in told
        assert ("begins     with a new state of the objective: the checkpoint has none" in told) == (
            objective != "cosface"
        )


def _told(tree: dict[str, Any]) -> str:
    """What a run says that goes on for one step."""
    with redirect_stdout(StringIO()) as told:
        train_on_rank(tree, 1, "auto")
    return told.getvalue()


def test_centers_may_become_narrower(folder: Path, tmp_path: Path) -> None:
    train(1, configuration(folder, tmp_path), steps=4)
    narrow = configuration(folder, tmp_path, head={"center_dtype": "bf16", "storage": "file"})
    lines = train(1, narrow)
    assert len(lines) == 8
    assert losses(lines)[-1] < losses(lines)[0]
    assert final(1, narrow)["centers"].dtype == torch.bfloat16


def test_what_changed_is_told_and_what_must_not_is_refused() -> None:
    def config(**sections: Any) -> Config:
        return parse_config({"data": {"train": "set"}, "schedule": {"steps": 10}, **sections})

    before = config()
    now = config(
        run={"name": "other"},
        schedule={"epochs": 3},
        precision="bf16",
        optimizer={"backbone": {"lr": 0.5}},
        head={"sample_rate": 0.5, "objective": {"name": "cosface"}},
    )
    told = changes(before, now, Path("step-1"), begun=True)
    assert len(told) == 6
    assert "changed    optimizer.backbone.lr: 0.1 → 0.5" in told
    assert "changed    head.sample_rate: 1.0 → 0.5" in told
    assert "changed    schedule.steps: 10 → nothing" in told
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"backbone": {"name": "small"}}, "backbone.name 'small': it was 'mobilefacenet'"),
        ({"backbone": {"options": {"width": 8}}}, "backbone.options {'width': 8}: it was {}"),
        ({"optimizer": {"backbone": {"name": "adamw"}}}, "optimizer.backbone.name 'adamw': it was 'sgd'"),
        ({"run": {"seed": 3}}, "run.seed 3: it was 0"),
    ]
    for sections, message in wrong:
        with pytest.raises(UsageError, match=message) as caught:
            changes(before, config(**sections), Path("step-1"), begun=True)
        assert "\n" not in str(caught.value)
    assert changes(before, config(run={"seed": 3}), Path("step-1"), begun=False) != []


def test_other_identities_are_refused(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path)
    train(1, config, steps=1)
    state = find(config.run.path).state()
    assert state["versions"]["torch"] == torch.__version__
    names = [f"person {label}" for label in range(37)]
    _name(folder / "train", names[::-1])
    try:
        with pytest.raises(RuntimeError, match=r"UsageError: .* was trained on other identities"):
            run_ranks(1, new_trainer, config.model_dump())
        anyway = configuration(folder, tmp_path, checkpoint={"check_labels": False})
        assert len(train(1, anyway)) == 8
    finally:
        _name(folder / "train", names)


# Beginning with what another run learned.


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = configuration(folder, tmp_path_factory.mktemp("trained"))
    train(2, config, steps=2)
    return config


@pytest.fixture(scope="module")
def fewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 identities; the even ones are the trained run's 36, 34, …, the others are new."""
    folder = tmp_path_factory.mktemp("fewer")
    pack_synthetic(folder / "train", identities=20, images_per_identity=4, size=24, workers=1)
    _name(folder / "train", [f"person {36 - label}" if label % 2 == 0 else f"new {label}" for label in range(20)])
    return folder


def begin(config: Config) -> dict[str, Tensor]:
    return run_ranks(2, _begin, config.model_dump())[0]


def _begin(tree: dict[str, Any]) -> dict[str, Tensor]:
    trainer = new_trainer(tree)
    assert trainer.step == 0
    assert trainer.loader.position == 0
    tensors = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    tensors["centers"] = trainer.head.centers.full_tensor()
    trainer.train_step()
    trainer.close()
    return tensors


def assert_backbone(begun: dict[str, Tensor], trained: Config) -> None:
    for name, value in load_backbone(trained.run.path)[0].state_dict().items():
        assert torch.equal(begun[name], value), name


def test_a_run_begins_with_another_ones_backbone(trained: Config, fewer: Path, tmp_path: Path) -> None:
    plain = begin(configuration(fewer, tmp_path / "plain"))
    begun = begin(configuration(fewer, tmp_path / "new", init={"path": str(trained.run.path)}))
    assert_backbone(begun, trained)
    assert torch.equal(begun["centers"], plain["centers"])


def test_centers_go_along_by_name(trained: Config, fewer: Path, tmp_path: Path) -> None:
    path = str(find(trained.run.path).path)
    plain = begin(configuration(fewer, tmp_path / "plain"))["centers"]
    begun = begin(configuration(fewer, tmp_path / "named", init={"path": path, "centers": "by_name"}))
    assert_backbone(begun, trained)
    old = final(2, trained)["centers"]
    for label in range(20):
        assert torch.equal(begun["centers"][label], old[36 - label] if label % 2 == 0 else plain[label])


def test_centers_are_kept_for_the_same_identities(trained: Config, folder: Path, fewer: Path, tmp_path: Path) -> None:
    init = {"path": str(trained.run.path), "centers": "keep"}
    begun = begin(configuration(folder, tmp_path / "kept", init=init))
    assert torch.equal(begun["centers"], final(2, trained)["centers"])
    with pytest.raises(RuntimeError, match=r"UsageError: init.centers keep: .* has 37 classes, .* has 20"):
        begin(configuration(fewer, tmp_path / "refused", init=init))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_run_begins_with_a_file_of_weights(trained: Config, fewer: Path, tmp_path: Path, suffix: str) -> None:
    weights, path = load_backbone(trained.run.path)[0].state_dict(), tmp_path / f"model{suffix}"
    torch.save(weights, path) if suffix == ".pt" else save_file(weights, path)
    assert_backbone(begin(configuration(fewer, tmp_path / "file", init={"path": str(path)})), trained)
    wide = {"options": {"width": 16, "norm": "group"}}
    with pytest.raises(RuntimeError, match=r"UsageError: init.path: .* is another network: .* there and .* here"):
        begin(configuration(fewer, tmp_path / "wide", init={"path": str(path)}, backbone=wide))
    with pytest.raises(RuntimeError, match=r"UsageError: init.centers: .* is a file of weights without centers"):
        begin(configuration(fewer, tmp_path / "refused", init={"path": str(path), "centers": "keep"}))
