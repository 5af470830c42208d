"""Parameters that are trained in another way, frozen ones, the average of the weights, recomputed activations."""

import copy
import itertools
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pfc.data.errors import UsageError
from pfc.engine.backbones import build_backbone
from pfc.engine.backbones.recompute import recompute, repeated
from pfc.engine.build import synchronised
from pfc.engine.checkpoint import find, load_backbone
from pfc.engine.config import Config, Optimizer
from pfc.engine.ema import Average
from pfc.engine.groups import block_numbers, treatments
from tests.engine.runs import configuration, final_tensors, new_trainer, pack, train
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("data"))


def small() -> nn.Module:
    return build_backbone("small", embedding_dim=16, image_size=(32, 32), width=8)


def of(*groups: dict[str, Any]) -> dict[str, Any]:
    return {"optimizer": {"backbone": {"lr": 0.01, "weight_decay": 0.1}, "groups": list(groups)}}


def test_later_groups_say_more_key_by_key() -> None:
    section = Optimizer.model_validate(
        of(
            {"vectors": True, "weight_decay": 0.0},
            {"names": ["fc.*", "features.*"], "lr": 10.0},
            {"names": "fc.bias", "lr": 2.0, "frozen_until": 3},
        )["optimizer"]
    )
    network = small()
    found = treatments(network, section)
    assert found.keys() == dict(network.named_parameters()).keys()
    told = {name: (one.lr, one.weight_decay, one.frozen_until) for name, one in found.items()}
    assert told["fc.weight"] == (10.0, 0.1, 0)
    assert told["fc.bias"] == (2.0, 0.0, 3)
    assert told["features.weight"] == (10.0, 0.0, 0)
    assert told["layers.0.weight"] == (1.0, 0.1, 0)
    assert told["layers.1.weight"] == (1.0, 0.0, 0)
    with pytest.raises(UsageError, match=r"optimizer\.groups\[0\]\.names: 'blocks\.\*' names no .* layers\.0"):
        treatments(network, Optimizer.model_validate(of({"names": "blocks.*"})["optimizer"]))


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("iresnet18", {"conv1.weight": 0, "layer1.0.conv1.weight": 1, "layer4.1.bn1.bias": 8, "fc.weight": 9}),
        (
            "vit_t",
            {"pos_embed": 0, "blocks.0.attn.qkv.weight": 1, "blocks.11.mlp.fc2.bias": 12, "feature.0.weight": 13},
        ),
        ("small", {"layers.0.weight": 0, "layers.3.layers.0.weight": 1, "layers.5.prelu.weight": 3, "fc.weight": 4}),
        ("timm/resnet10t", {"model.conv1.0.weight": 0, "model.layer1.0.conv1.weight": 1, "fc.weight": 5}),
    ],
)
def test_rates_fall_block_by_block_towards_the_stem(name: str, numbers: dict[str, int]) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    network = build_backbone(name, embedding_dim=16, image_size=(36, 36))
    found = block_numbers(network)
    assert {key: found[key] for key in numbers} == numbers
    last = max(numbers.values())
    assert max(found.values()) == last
    rates = treatments(network, Optimizer.model_validate(of({"layer_decay": 0.5})["optimizer"]))
    assert {key: rates[key].lr for key in numbers} == {key: 0.5 ** (last - number) for key, number in numbers.items()}


def steps(tree: dict[str, Any], number: int) -> list[dict[str, Tensor]]:
    """On a rank: the network's weights and buffers before each step and after the last."""
    trainer = new_trainer(tree)
    states = []
    try:
        for _ in range(number):
            states.append({name: value.clone() for name, value in trainer.network.state_dict().items()})
            trainer.train_step()
        states.append({name: value.clone() for name, value in trainer.network.state_dict().items()})
    finally:
        trainer.close()
    return states


def run(world_size: int, config: Config, number: int = 4) -> list[dict[str, Tensor]]:
    return run_ranks(world_size, steps, config.model_dump(), number)[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_rates_and_decays_are_those_of_the_groups(folder: Path, tmp_path: Path, world_size: int) -> None:
    """SGD without momentum: what a step changes is the rate times the gradient, and the decay."""
    backbone = {"name": "sgd", "lr": 0.01, "momentum": 0.0, "weight_decay": 0.0}
    plain = configuration(folder, tmp_path / "plain", optimizer={"backbone": backbone})
    groups: list[dict[str, Any]] = [{"names": "fc.*", "lr": 3.0}, {"names": "layers.0.*", "lr": 0.0}]
    groups.append({"names": "layers.3.*", "weight_decay": 2.0})
    treated = configuration(folder, tmp_path / "treated", optimizer={"backbone": backbone, "groups": groups})
    before, after = run(world_size, plain, 1)
    _, other = run(world_size, treated, 1)
    for name, value in before.items():
        change = after[name] - value
        wanted = {"fc": 3 * change, "layers.0": 0 * change, "layers.3": change - 0.01 * 2 * value}
        which = next((key for key in wanted if name.startswith(f"{key}.")), "")
        torch.testing.assert_close(other[name] - value, wanted.get(which, change), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_parameters_and_their_statistics_rest_until_their_step(
    folder: Path, tmp_path: Path, world_size: int, optimizer: str
) -> None:
    config = configuration(
        folder,
        tmp_path,
        backbone={"options": {"width": 8, "norm": "batch"}},
        optimizer={
            "backbone": {"name": optimizer, "lr": 0.01},
            "groups": [{"names": "layers.*", "frozen_until": 2}, {"names": "fc.bias", "frozen_until": "end"}],
        },
    )
    states = run(world_size, config)
    moved = [
        {name for name, value in after.items() if not torch.equal(value, before[name])}
        for before, after in itertools.pairwise(states)
    ]
    layers = {name for name in states[0] if name.startswith("layers.")}
    for early in moved[:2]:
        assert not early & layers
        assert "fc.weight" in early
        assert "features.running_mean" in early
    for late in moved[2:]:
        assert layers - late == set()
        assert "fc.bias" not in late


def test_thawing_on_two_ranks_is_thawing_on_one(folder: Path, tmp_path: Path) -> None:
    groups = {"groups": [{"names": "layers.*", "frozen_until": 3}]}
    one = configuration(folder, tmp_path / "one", data={"batch_size": 12}, optimizer=groups)
    two = configuration(folder, tmp_path / "two", data={"batch_size": 6}, optimizer=groups)
    lines, other = train(1, one), train(2, two)
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in lines], rel=1e-4)


@pytest.mark.parametrize("world_size", [1, 2])
def test_centers_alone_are_trained_where_all_is_frozen(folder: Path, tmp_path: Path, world_size: int) -> None:
    config = configuration(
        folder,
        tmp_path,
        optimizer={"groups": [{"frozen_until": "end"}], "accumulate": 2, "head": {"name": "row_sgd", "lr": 0.02}},
    )
    states = run(world_size, config, 1)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    untrained = configuration(folder, tmp_path / "untrained")
    lines = train(world_size, config)
    assert lines[-1]["gradient_norm"] == 0
    centers = [run_ranks(world_size, final_tensors, one.model_dump())[0]["centers"] for one in (config, untrained)]
    assert (centers[0] != centers[1]).all(dim=1).all()


def test_a_frozen_run_resumes_as_it_was(folder: Path, tmp_path: Path) -> None:
    groups = {"groups": [{"names": "layers.*", "frozen_until": 5}], "backbone": {"name": "adamw", "lr": 0.01}}
    straight = configuration(folder, tmp_path / "straight", optimizer=groups)
    broken = configuration(folder, tmp_path / "broken", optimizer=groups)
    lines = train(2, straight)
    train(2, broken, steps=3)
    assert [line["loss"] for line in train(2, broken)] == [line["loss"] for line in lines]


def test_the_average_is_the_one_of_its_formula() -> None:
    network = small()
    average = Average(network, 0.9)
    wanted = {name: value.clone().double() for name, value in network.state_dict().items()}
    for step in range(1, 101):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        network(torch.rand(2, 3, 32, 32))
        average.update(network, step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                wanted[name] += (1 - decay) * (value - wanted[name])
            else:
                wanted[name] = value.double()
    assert decay == 0.9
    for name, value in average.network.state_dict().items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-4, atol=1e-5)


def averaged(tree: dict[str, Any]) -> dict[str, Tensor]:
    trainer = new_trainer(tree)
    try:
        assert trainer.parts.average is not None
        return {name: value.clone() for name, value in trainer.parts.average.network.state_dict().items()}
    finally:
        trainer.close()


def test_the_average_is_saved_resumed_evaluated_and_given(folder: Path, tmp_path: Path) -> None:
    changes = {"backbone": {"ema": 0.5}, "evaluation": {"pairs": [str(folder / "pairs.bin")], "every_steps": 1000}}
    straight = configuration(folder, tmp_path / "straight", **changes)
    broken = configuration(folder, tmp_path / "broken", **changes)
    train(2, straight)
    train(2, broken, steps=3)
    train(2, broken)
    first, second = (run_ranks(2, averaged, one.model_dump()) for one in (straight, broken))
    given = load_backbone(straight.run.path)[0].state_dict()
    last = run(1, straight, 0)[0]
    assert any(not torch.equal(value, last[name]) for name, value in given.items()), "not the last weights"
    for name, value in given.items():
        assert all(torch.equal(value, one[name]) for one in (*first, *second)), name
    scores = [(one.run.path / "evaluation.jsonl").read_text().splitlines()[-1] for one in (straight, broken)]
    assert scores[0].rpartition(', "seconds"')[0] == scores[1].rpartition(', "seconds"')[0] != ""
    assert find(straight.run.path).shapes().keys() >= {"ema/fc.weight", "backbone/fc.weight"}


def test_an_average_may_begin_with_a_resume_and_end_with_one(folder: Path, tmp_path: Path) -> None:
    plain = configuration(folder, tmp_path)
    train(1, plain, steps=3)
    weights = run(1, plain, 0)[0]
    begun = configuration(folder, tmp_path, backbone={"ema": 0.9})
    found = run_ranks(1, averaged, begun.model_dump())[0]
    assert all(torch.equal(value, weights[name]) for name, value in found.items())
    train(1, begun, steps=2)
    train(1, plain)
    assert not any(name.startswith("ema/") for name in find(plain.run.path).shapes())
    new = configuration(folder, tmp_path / "new", backbone={"ema": 0.9}, init={"path": str(plain.run.path)})
    weights, found = run(1, plain, 0)[0], run_ranks(1, averaged, new.model_dump())[0]
    assert all(torch.equal(value, weights[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("name", "options", "blocks"),
    [("small", {"width": 8}, 3), ("iresnet18", {}, 8), ("mobilefacenet", {}, 15), ("vit_t", {"mask": 0.0}, 12)],
)
def test_recomputed_activations_change_nothing_but_memory(name: str, options: dict[str, Any], blocks: int) -> None:
    torch.manual_seed(0)
    network = build_backbone(name, embedding_dim=16, image_size=(36, 36), **options)
    assert len(list(repeated(network))) == blocks
    again = copy.deepcopy(network)
    recompute(again)
    copied = copy.deepcopy(again)
    images, kept = torch.rand(4, 3, 36, 36), {}
    for key, one in (("plain", network), ("again", again)):
        sizes: list[int] = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.nbytes), x)[1], lambda x: x):
            embeddings = one(images)
        embeddings.square().sum().backward()
        kept[key] = sum(sizes)
    assert kept["again"] < 0.6 * kept["plain"]
    for (key, value), other in zip(network.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    for (key, value), other in zip(network.named_parameters(), again.parameters(), strict=True):
        if value.grad is not None:
            torch.testing.assert_close(other.grad, value.grad, rtol=1e-5, atol=1e-6, msg=key)
    copied.requires_grad_(False)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied.eval()(images).any(), "a copy computes with its own weights"


def test_a_run_with_recomputed_activations_is_the_same(folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"options": {"width": 8, "norm": "batch"}}
    plain = configuration(folder, tmp_path / "plain", backbone=changes)
    again = configuration(folder, tmp_path / "again", backbone={**changes, "recompute": True})
    lines, other = train(2, plain), train(2, again)
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in lines], rel=1e-5)


def test_networks_without_blocks_cannot_recompute() -> None:
    with pytest.raises(UsageError, match="no repeated blocks"):
        recompute(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))
    with pytest.raises(UsageError, match="recompute and compile"):
        configuration(Path(), Path(), backbone={"recompute": True, "compile": True})


def told_at_start(tree: dict[str, Any]) -> str:
    with redirect_stdout(StringIO()) as told:
        new_trainer(tree).close()
    return told.getvalue()


def test_a_partial_start_takes_what_fits_and_tells_the_rest(folder: Path, tmp_path: Path) -> None:
    other = configuration(folder, tmp_path / "other", backbone={"embedding_dim": 24})
    train(1, other, steps=1)
    config = configuration(folder, tmp_path / "new", init={"path": str(other.run.path)})
    with pytest.raises(RuntimeError, match=r"is another network: fc\.weight is \[24, 64\] .* or init\.partial: true"):
        run_ranks(1, new_trainer, config.model_dump())
    partial = configuration(folder, tmp_path / "new", init={"path": str(other.run.path), "partial": True})
    first, begun = run(1, other, 0)[0], run(1, partial, 0)[0]
    for name, value in begun.items():
        assert value.shape != first[name].shape or torch.equal(value, first[name]), name
    (told,) = run_ranks(1, told_at_start, partial.model_dump())
    assert "tensors; of another shape: fc.weight, fc.bias, features.weight, features.bias), new centers" in told


def test_a_network_with_an_unused_parameter_is_told_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "idle_net.py").write_text(
        "from torch import nn\n"
        "def net(embedding_dim, image_size):\n"
        "    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size[0] * image_size[1], embedding_dim))\n"
        "    network.idle = nn.Linear(2, 2)\n"
        "    network.forward = lambda x, n=network: n[1](n[0](x))\n"
        "    return network\n"
    )
    own = {"run": {"name": "test", "dir": str(tmp_path), "code": str(tmp_path)}}
    config = configuration(folder, tmp_path, backbone={"name": "idle_net:net", "options": {}}, **own)
    with pytest.raises(RuntimeError, match=r"UsageError: backbone: .* does not depend on idle\.weight, idle\.bias"):
        run(2, config, 1)
    frozen = {"groups": [{"names": "idle.*", "frozen_until": "end"}]}
    run(
        2, configuration(folder, tmp_path, backbone={"name": "idle_net:net", "options": {}}, optimizer=frozen, **own), 2
    )


def test_statistics_over_all_ranks_keep_what_a_network_computes() -> None:
    pytest.importorskip("timm")
    network = build_backbone("timm/mobilenetv3_small_050", embedding_dim=8, image_size=(32, 32)).eval()
    converted = synchronised(copy.deepcopy(network)).eval()
    assert any(isinstance(one, nn.SyncBatchNorm) for one in converted.modules())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(network(images), nn.Module.__call__(converted, images))

    class Odd(nn.BatchNorm2d):
        pass

    with pytest.raises(UsageError, match=r"sync_bn: 1 is a Odd, which would become a plain SyncBatchNorm"):
        synchronised(nn.Sequential(nn.Conv2d(3, 3, 3), Odd(3)))


def test_shared_weights_are_averaged_once() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    average = Average(network, 0.9)
    before = average.network[0].weight.clone()
    with torch.no_grad():
        network[0].weight += 1
    average.update(network, 1000)
    torch.testing.assert_close(average.network[1].weight, before + 0.1)
