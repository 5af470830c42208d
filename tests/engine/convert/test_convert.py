"""What `pfc convert` takes from the common implementation's files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pfc.data import pack_synthetic
from pfc.data.errors import UsageError
from pfc.engine import checkpoint
from pfc.engine.backbones import build_backbone
from pfc.engine.backbones.iresnet import DEPTHS
from pfc.engine.config import load_config
from pfc.engine.convert.backbone import find_network
from pfc.engine.convert.convert import convert
from pfc.engine.log.telemetry import read_json_lines
from tests.engine.convert.common_files import (
    CLASSES,
    DIM,
    ROWS,
    SIZE,
    STEP,
    head_state,
    joined,
    leave,
    network,
    read_all,
    small_files,
    write,
)
from tests.engine.runs import configuration, new_trainer
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return leave(tmp_path_factory.mktemp("common") / "run")


@pytest.mark.parametrize("kind", ["model.pt", "module.", "checkpoints"])
def test_the_backbone_computes_the_same_bits(source: Path, tmp_path: Path, kind: str) -> None:
    given = source / "model.pt" if kind == "model.pt" else source
    if kind == "module.":
        given = tmp_path / "wrapped.pt"
        torch.save({f"module.{name}": value for name, value in torch.load(source / "model.pt").items()}, given)
    summary = convert(given, tmp_path / "out")
    converted, config = checkpoint.load_backbone(tmp_path / "out")
    assert (summary.backbone, summary.embedding_dim, summary.image_size) == ("iresnet18", DIM, (SIZE, SIZE))
    assert (config.backbone.name, config.backbone.embedding_dim) == ("iresnet18", DIM)
    original = network().eval()
    original.load_state_dict(torch.load(source / "model.pt"))
    images = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(converted(images), original(images))


def test_centers_momentum_and_counters_come_over(tmp_path: Path) -> None:
    files = small_files()
    out = tmp_path / "out"
    summary = convert(write(tmp_path / "in", files), out)
    assert summary.notes == []
    assert (summary.num_classes, summary.ranks, summary.step, summary.epoch) == (CLASSES, 3, STEP, 3)
    assert "epoch 3" in str(summary)
    tensors = read_all(out)
    assert torch.equal(tensors["head/centers"], joined(files, lambda of: of["state_dict_softmax_fc"]["weight"]))
    # features.weight has a number but no state, so the centers' number is the count of states
    assert torch.equal(tensors["head_optimizer/momentum"], joined(files, head_state("momentum_buffer")))
    for number, (name, parameter) in enumerate(network().named_parameters()):
        path = f"backbone_optimizer/{name}/momentum_buffer"
        if name == "features.weight":
            assert path not in tensors
        else:
            assert torch.equal(tensors[path], torch.tensor((number + 1) * 1e-5).expand(parameter.shape)), name
    found = checkpoint.find(out)
    assert found.path.name == f"step-{STEP:08d}"
    assert found.state()["position"] == 0
    optimizer = load_config(out / "config.yaml").optimizer
    assert (optimizer.backbone.lr, optimizer.head.lr, optimizer.head.name) == (0.1, 0.1, "row_sgd")


def test_adamw_comes_over_by_the_row_optimizers_names(tmp_path: Path) -> None:
    files = small_files("adamw")
    files[1]["state_optimizer"]["state"][len(files[1]["state_optimizer"]["state"])]["step"] = STEP  # as older torch has
    assert convert(write(tmp_path / "in", files), tmp_path / "out").notes == []
    tensors = read_all(tmp_path / "out")
    assert torch.equal(tensors["head_optimizer/first_moment"], joined(files, head_state("exp_avg")))
    assert torch.equal(tensors["head_optimizer/second_moment"], joined(files, head_state("exp_avg_sq")))
    assert torch.equal(tensors["head_optimizer/steps"], torch.full((CLASSES, 1), float(STEP)))
    assert tensors["backbone_optimizer/conv1.weight/step"] == STEP
    assert tensors["backbone_optimizer/fc.bias/exp_avg"].shape == (DIM,)
    assert load_config(tmp_path / "out" / "config.yaml").optimizer.head.name == "row_adamw"


def test_training_goes_on_as_if_the_tensors_were_set_by_hand(source: Path, tmp_path: Path) -> None:
    pack_synthetic(tmp_path / "train", identities=CLASSES, images_per_identity=4, size=SIZE, workers=1)
    convert(source, tmp_path / "out")
    changes: dict[str, Any] = {"data": {"batch_size": 4}, "schedule": {"steps": 30}, "head": {"sample_rate": 0.5}}
    changes["backbone"] = {"name": "iresnet18", "embedding_dim": DIM, "options": {}}
    runs = [configuration(tmp_path, tmp_path / name, **changes).model_dump() for name in ("resumed", "by_hand")]
    resumed = run_ranks(2, _two_steps, runs[0], str(tmp_path / "out"), None)
    by_hand = run_ranks(2, _two_steps, runs[1], "never", source)
    assert np.isfinite(resumed[0][0]).all()
    for one, other in zip(resumed, by_hand, strict=True):
        assert one[0] == other[0]
        assert one[1].keys() == other[1].keys()
        for name, value in one[1].items():
            assert torch.equal(value, other[1][name]), name


def _two_steps(tree: dict[str, Any], resume: str, folder: Path | None) -> tuple[list[float], dict[str, Tensor]]:
    """On a rank: the losses of two steps, and the tensors after them."""
    trainer = new_trainer(tree, resume)
    if folder is not None:
        files = {rank: torch.load(folder / f"checkpoint_gpu_{rank}.pt") for rank in range(len(ROWS))}
        trainer.network.load_state_dict(files[0]["state_dict_backbone"])
        trainer.head.load_centers(joined(files, lambda of: of["state_dict_softmax_fc"]["weight"]))
        state = {"momentum": joined(files, head_state("momentum_buffer"))}
        groups = trainer.head_optimizer.state_dict()["param_groups"]
        trainer.head_optimizer.load_state_dict({"state": state, "param_groups": groups})
        states = files[0]["state_optimizer"]["state"]
        for number, parameter in enumerate(trainer.network.parameters()):
            if number in states:
                trainer.backbone_optimizer.state[parameter]["momentum_buffer"] = (
                    states[number]["momentum_buffer"].contiguous().clone()
                )
        trainer.step = trainer.head.steps = STEP
    assert trainer.step == STEP
    trainer.train_step()
    trainer.train_step()
    trainer.close()
    tensors = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    tensors["centers"] = trainer.head.centers.full_tensor()
    return [line["loss"] for line in read_json_lines(trainer.run_dir / "metrics.jsonl")], tensors


def test_a_backbone_alone_cannot_be_resumed(source: Path, tmp_path: Path) -> None:
    pack_synthetic(tmp_path / "train", identities=CLASSES, images_per_identity=1, size=SIZE, workers=1)
    assert "--resume" not in str(convert(source / "model.pt", tmp_path / "out"))
    changes = {"backbone": {"name": "iresnet18", "embedding_dim": DIM, "options": {}}}
    tree = configuration(tmp_path, tmp_path / "runs", **changes).model_dump()
    run_ranks(1, _assert_not_resumed, tree, str(tmp_path / "out"))


def _assert_not_resumed(tree: dict[str, Any], resume: str) -> None:
    with pytest.raises(UsageError, match=r"holds a backbone without centers.*checkpoint_gpu_\*.pt"):
        new_trainer(tree, resume)


@pytest.mark.parametrize("layers", DEPTHS)
def test_the_network_is_told_by_its_blocks(layers: int) -> None:
    with torch.device("meta"):
        square = build_backbone(f"iresnet{layers}", embedding_dim=512, image_size=(112, 112)).state_dict()
        oblong = build_backbone(f"iresnet{layers}", embedding_dim=128, image_size=(112, 96)).state_dict()
    found = find_network(Path("model.pt"), square)
    assert (found.name, found.embedding_dim, found.image_size) == (f"iresnet{layers}", 512, (112, 112))
    with pytest.raises(UsageError, match=r"fc takes 21504 features, .* --size HxW"):
        find_network(Path("model.pt"), oblong)
    assert find_network(Path("model.pt"), oblong, image_size=(112, 96)).embedding_dim == 128


def test_momentum_follows_the_order_of_the_file(tmp_path: Path) -> None:
    """Numbers of parameters are those of the network that wrote the file, however it declares its layers."""
    files = small_files()
    weights = files[0]["state_dict_backbone"]
    names = [name for name in weights if not name.endswith(("mean", "var", "tracked"))]
    files[0]["state_dict_backbone"] = {name: weights[name] for name in reversed(weights)}
    states, count = files[0]["state_optimizer"]["state"], len(names)
    turned = {count - 1 - number: state for number, state in states.items() if number < count}
    files[0]["state_optimizer"]["state"] = turned | {count: states[count]}
    assert convert(write(tmp_path / "in", files), tmp_path / "out").notes == []
    momentum = read_all(tmp_path / "out")["backbone_optimizer/conv1.weight/momentum_buffer"]
    assert (momentum == torch.tensor(1e-5)).all()


def _without_state(content: dict[str, Any]) -> None:
    for state in content["state_optimizer"]["state"].values():
        state["momentum_buffer"] = None


def _sampled_copy(content: dict[str, Any]) -> None:
    states = content["state_optimizer"]["state"]
    states[len(states)]["momentum_buffer"] = torch.ones(2, DIM)


def _other_optimizer(content: dict[str, Any]) -> None:
    content["state_optimizer"]["param_groups"] = [{"params": [0], "lr": 1.0, "alpha": 0.99}]


@pytest.mark.parametrize(
    ("change", "told", "backbone"),
    [
        (_without_state, ["no optimizer state of the backbone", "no optimizer state of the centers"], False),
        (_sampled_copy, ["of the centers: momentum_buffer in checkpoint_gpu_0.pt is [2, 16] for [4, 16]"], True),
        (_other_optimizer, ["state_optimizer is not SGD's or AdamW's"], False),
        (lambda content: content.pop("state_optimizer"), ["state_optimizer is not SGD's or AdamW's"], False),
    ],
)
def test_state_that_does_not_fit_is_left_out_and_told(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], told: list[str], backbone: bool
) -> None:
    files = small_files()
    for content in files.values():
        change(content)
    summary = convert(write(tmp_path / "in", files), tmp_path / "out")
    assert len(summary.notes) == len(told)
    for note, words in zip(summary.notes, told, strict=True):
        assert words in note
        assert note in str(summary)
    tensors = read_all(tmp_path / "out")
    assert torch.equal(tensors["head_optimizer/momentum"], torch.zeros(CLASSES, DIM)), "so that training can go on"
    assert any(name.startswith("backbone_optimizer/") for name in tensors) == backbone
