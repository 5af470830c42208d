from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfc.data.errors import UsageError
from pfc.engine.checkpoint import find, find_all, load_backbone
from pfc.engine.config import Config, load_config
from pfc.engine.log.telemetry import read_json_lines
from tests.engine.runs import IDENTITIES, PER_IDENTITY, configuration, final_tensors, new_trainer, pack, train
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("data"))


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


def test_twenty_steps_on_two_ranks_are_those_on_one(folder: Path, tmp_path: Path) -> None:
    one = configuration(folder, tmp_path / "one", data={"batch_size": 12}, schedule={"steps": 20})
    two = configuration(folder, tmp_path / "two", data={"batch_size": 6}, schedule={"steps": 20})
    alone, together = train(1, one), train(2, two)
    assert len(alone) == 20
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    assert alone[-1]["loss"] != pytest.approx(alone[0]["loss"], rel=1e-2)


def test_a_sampled_run_is_the_same_on_three_ranks(folder: Path, tmp_path: Path) -> None:
    sampled = {"head": {"sample_rate": 0.3, "objective": {"name": "d_softmax", "scale": 8.0}}}
    one = configuration(folder, tmp_path / "one", data={"batch_size": 12}, **sampled)
    three = configuration(folder, tmp_path / "three", data={"batch_size": 4}, **sampled)
    assert losses(train(3, three)) == pytest.approx(losses(train(1, one)), rel=1e-4)


def test_accumulated_micro_batches_are_one_batch(folder: Path, tmp_path: Path) -> None:
    whole = configuration(folder, tmp_path / "whole", data={"batch_size": 6})
    parts = configuration(folder, tmp_path / "parts", data={"batch_size": 2}, optimizer={"accumulate": 3})
    assert losses(train(2, parts)) == pytest.approx(losses(train(2, whole)), rel=1e-4)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kinds", [("sgd", "row_sgd"), ("adamw", "row_adamw"), ("sgd", "row_adagrad")])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    folder: Path, tmp_path: Path, world_size: int, kinds: tuple[str, str]
) -> None:
    changes = {
        "backbone": {"options": {"width": 8, "norm": "batch"}, "channels_last": True},
        "head": {"sample_rate": 0.4},
        "optimizer": {"backbone": {"name": kinds[0]}, "head": {"name": kinds[1]}},
    }
    straight = configuration(folder, tmp_path / "straight", **changes)
    broken = configuration(folder, tmp_path / "broken", **changes)
    lines = train(world_size, straight)
    train(world_size, broken, steps=3)
    assert find_all(broken.run.path)[-1].step == 3
    resumed = train(world_size, broken)
    assert losses(resumed) == losses(lines)
    assert [line["step"] for line in resumed] == list(range(1, 9))
    _assert_same(_final(world_size, straight), _final(world_size, broken))


def _final(world_size: int, config: Config) -> dict[str, torch.Tensor]:
    return run_ranks(world_size, final_tensors, config.model_dump())[0]


def _assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_sample_rate_follows_its_schedule_after_a_resume_too(folder: Path, tmp_path: Path) -> None:
    head = {"sample_rate": 0.3, "sample_rate_schedule": [[0.5, 0.6], [0.75, 1.0]]}
    straight, broken = (configuration(folder, tmp_path / runs, head=head) for runs in ("straight", "broken"))
    lines = train(2, straight)
    assert [line["sample_rate"] for line in lines] == [0.3] * 4 + [0.6] * 2 + [1.0] * 2
    train(2, broken, steps=5)
    assert losses(train(2, broken)) == losses(lines)


def waits_of_two_steps(tree: dict[str, Any]) -> list[str]:
    """On a rank: when the backbone begins, when something waits for the row update, and when that begins."""
    trainer = new_trainer(tree)
    trainer.train_step()
    told: list[str] = []
    stream = trainer.head.side_stream
    wait = stream.join
    stream.join = lambda: told.append("wait") or wait()
    trainer.network.register_forward_pre_hook(lambda *_: told.append("backbone"))
    trainer.head_optimizer.register_step_pre_hook(lambda *_: told.append("update"))
    for _ in range(2):
        trainer.train_step()
        trainer.consult()
    trainer.close()
    return told


def test_the_row_update_runs_on_beside_the_next_forward_pass(folder: Path, tmp_path: Path) -> None:
    """On a GPU it has a stream of its own; nothing but the head's next forward pass may wait for it."""
    config = configuration(folder, tmp_path)
    assert run_ranks(1, waits_of_two_steps, config.model_dump()) == [["backbone", "wait", "update"] * 2]


def test_bf16_payload_trains(folder: Path, tmp_path: Path) -> None:
    lines = train(2, configuration(folder, tmp_path / "bf16", head={"payload_dtype": "bf16"}))
    exact = train(2, configuration(folder, tmp_path / "exact"))
    assert losses(lines) == pytest.approx(losses(exact), rel=0.05)
    assert losses(lines) != losses(exact)


def test_what_a_run_leaves_behind(folder: Path, tmp_path: Path) -> None:
    config = configuration(
        folder,
        tmp_path,
        schedule={"steps": 8, "warmup_steps": 4},
        evaluation={"every_steps": 4, "pairs": [str(folder / "pairs.bin")]},
        checkpoint={"every_steps": 2, "keep": 2},
        log={"every_steps": 3, "tensorboard": True},
    )
    lines = train(2, config, report=True)
    run = config.run.path
    resolved = load_config(run / "config.yaml")
    assert resolved.data.image_size == [24, 24]
    assert resolved.head.num_classes == IDENTITIES
    assert resolved.optimizer == config.optimizer
    assert [line["step"] for line in lines] == [1, 3, 6, 8]
    assert lines[0]["lr"] == pytest.approx(0.005 / 4), "the first step starts low"
    assert {"step", "loss", "lr", "images_per_second", "data_share", "skipped_steps"} <= lines[0].keys()
    evaluations = read_json_lines(run / "evaluation.jsonl")
    assert [(line["step"], line["set"]) for line in evaluations] == [(0, "pairs"), (4, "pairs"), (8, "pairs")]
    assert [found.step for found in find_all(run)] == [6, 8]
    assert (run / "report.html").stat().st_size > 10_000
    assert any((run / "tensorboard").iterdir())
    with np.load(run / "evaluation" / "pairs-00000008.npz") as saved:
        assert saved["cosine"].shape == saved["same"].shape == (60,)


def test_the_saved_network_is_the_trained_one(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, data={"image_size": [24, 24]}, head={"num_classes": IDENTITIES})
    train(1, config)
    trained = _final(1, config)
    for path in (config.run.path, find(config.run.path).path):
        network, loaded_config = load_backbone(path)
        assert loaded_config == config
        assert not network.training
        for name, value in network.state_dict().items():
            assert torch.equal(value, trained[f"network/{name}"])


def test_bf16_follows_float32(folder: Path, tmp_path: Path) -> None:
    lines = train(2, configuration(folder, tmp_path, precision="bf16"))
    exact = train(2, configuration(folder, tmp_path / "exact"))
    assert losses(lines) == pytest.approx(losses(exact), rel=0.05)
    assert losses(lines) != losses(exact)


def test_fp16_finds_its_scale_and_trains(folder: Path, tmp_path: Path) -> None:
    lines = train(2, configuration(folder, tmp_path, precision="fp16", schedule={"steps": 30}))
    assert all(np.isfinite(losses(lines)))
    skipped = lines[-1]["skipped_steps"]  # GradScaler begins at 65536 and halves at each overflow
    assert skipped < 10
    assert lines[-1]["loss_scale"] == 65536 / 2**skipped
    assert np.mean(losses(lines)[-5:]) < np.mean(losses(lines)[1:6])


def test_clipping_bounds_the_step(folder: Path, tmp_path: Path) -> None:
    """With weight decay and momentum off, a step is lr times the gradient, whose norm clipping bounds."""
    plain = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    config = configuration(folder, tmp_path, optimizer={"backbone": plain, "clip_norm": 1e-3})
    assert run_ranks(2, _size_of_first_step, config.model_dump())[0] == pytest.approx(1e-3, rel=1e-3)


def _size_of_first_step(tree: dict[str, Any]) -> float:
    trainer = new_trainer(tree)
    before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    trainer.train_step()
    trainer.close()
    after = trainer.network.parameters()
    return float(torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm())


def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(folder: Path, tmp_path: Path) -> None:
    for unchanged, skipped in run_ranks(2, _poisoned_step, configuration(folder, tmp_path).model_dump()):
        assert unchanged
        assert skipped == 1


def _poisoned_step(tree: dict[str, Any]) -> tuple[bool, int]:
    trainer = new_trainer(tree)
    trainer.train_step()
    hook = None
    if trainer.world.rank == 1:  # one rank's embeddings are broken, once
        hook = trainer.network.register_forward_hook(lambda _module, _inputs, output: output * torch.nan)
    before = [tensor.detach().clone() for tensor in (*trainer.network.parameters(), trainer.head.weight)]
    trainer.train_step()
    after = [*trainer.network.parameters(), trainer.head.weight]
    unchanged = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    if hook is not None:
        hook.remove()
    trainer.train_step()
    moved = [*trainer.network.parameters(), trainer.head.weight]
    assert any(not torch.equal(a, b) for a, b in zip(moved, before, strict=True))
    trainer.close()
    return unchanged, int(trainer.skipped_steps)


def test_epochs_become_steps(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, schedule={"steps": None, "epochs": 1.5})
    lines = train(2, config)
    assert lines[-1]["step"] == -(-IDENTITIES * PER_IDENTITY * 3 // 2 // 12)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"head": {"num_classes": 36}}, "head.num_classes is 36, but .* has 37 identities"),
        ({"backbone": {"sync_bn": True}}, "backbone.sync_bn: torch has it on GPUs only"),
        ({"evaluation": {"pairs": ["none.bin"]}}, "none.bin"),
        ({"data": {"train": "nowhere"}}, "nowhere: no such data set"),
        ({"backbone": {"name": "resnet"}}, "resnet"),
    ],
)
def test_what_does_not_fit_together_is_wrong_use(
    folder: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    run_ranks(1, _assert_refused, configuration(folder, tmp_path, **sections).model_dump(), "auto", message)


def test_resuming_refuses_what_cannot_go_on(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path)
    train(1, config, steps=2)
    run_ranks(
        1, _assert_refused, config.model_dump(), "never", "holds a run that got to step 2: go on with --resume auto"
    )
    run_ranks(1, _assert_refused, config.model_dump(), str(tmp_path / "none"), "no such run or checkpoint")
    wider = configuration(folder, tmp_path, backbone={"embedding_dim": 48}).model_dump()
    run_ranks(1, _assert_refused, wider, "auto", "backbone.embedding_dim 48: it was 32")
    adam = configuration(folder, tmp_path, optimizer={"head": {"name": "row_adamw"}}).model_dump()
    run_ranks(1, _assert_refused, adam, "auto", "optimizer.head.name 'row_adamw': it was 'row_sgd'")
    assert find_all(config.run.path)[-1].step == 2, "and nothing is lost"


def _assert_refused(tree: dict[str, Any], resume: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        new_trainer(tree, resume)
    assert "\n" not in str(caught.value)


def test_a_half_written_checkpoint_is_not_one(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path)
    train(1, config, steps=2)
    partial = config.run.path / "checkpoints" / ".step-00000005.partial"
    partial.mkdir()
    (partial / "state.json").write_text("{")
    assert [found.step for found in find_all(config.run.path)] == [2]
    assert len(train(1, config)) == 8


def test_a_warm_up_longer_than_the_run_is_refused(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, schedule={"steps": None, "epochs": 1, "warmup_steps": 38})
    with pytest.raises(
        RuntimeError, match=r"schedule\.warmup_steps \(38\) is more than the 37 steps of 1 epochs: take fewer"
    ):
        train(1, config)
    assert not (tmp_path / "test" / "config.yaml").exists()
