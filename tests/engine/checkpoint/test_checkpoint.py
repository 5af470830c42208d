"""Checkpoints: whole or not at all, kept, and the best of them."""

import json
import os
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pfc.data.errors import UsageError
from pfc.engine.checkpoint import (
    Best,
    Content,
    Found,
    Piece,
    find,
    find_all,
    find_latest,
    go_back,
    load,
    write,
)
from pfc.engine.checkpoint.manager import check_space
from pfc.engine.trainer import Trainer
from tests.commands import forkserver
from tests.engine.runs import configuration, new_trainer, pack, train
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("data"))


def content(step: int, accuracy: float | None = None) -> Content:
    """A megabyte that says which step it is of, in a whole tensor and in a sharded one."""
    rows = torch.full((1000, 128), float(step))
    state: dict[str, Any] = {"position": step, "head_steps": step, "num_classes": 1000}
    if accuracy is not None:
        state["evaluation"] = {"pairs": {"accuracy": accuracy}}
    return Content(step, {"whole": rows}, {"sharded": Piece(rows, 0, 1000, torch.float32)}, state, "run: {}\n")


def assert_is_of_its_step(found: Found) -> None:
    whole, sharded = torch.empty(1000, 128), torch.empty(1000, 128)
    load(found, {"whole": whole, "sharded": sharded})
    assert found.state()["position"] == found.step
    assert (whole == found.step).all()
    assert (sharded == found.step).all()


def test_a_save_killed_at_any_moment_leaves_the_one_before(tmp_path: Path) -> None:
    context = forkserver()
    moments, last, inside = random.Random(0), 0, 0
    for _ in range(20):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_save_for_ever, args=(tmp_path, last + 1, sender))
        process.start()
        assert receiver.poll(60)
        receiver.recv()  # the first save is done
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        inside += any((tmp_path / "checkpoints").glob(".*.partial"))
        for found in find_all(tmp_path):  # whatever has the name is complete
            assert_is_of_its_step(found)
        step = find(tmp_path / "checkpoints" / "latest").step
        assert step > last
        last = step
    assert inside > 5, "the kills should meet saves"


def _save_for_ever(run_dir: Path, first: int, sender: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for step in range(first, first + 100_000):
        assert write(run_dir, content(step), keep=2) is None
        if step == first:
            sender.send(step)


@pytest.mark.parametrize(("full", "asynchronous"), [(1, False), (1, True), (0, True)])
def test_a_full_disk_of_one_rank_is_told_and_training_goes_on(
    folder: Path, tmp_path: Path, full: int, asynchronous: bool
) -> None:
    config = configuration(folder, tmp_path, checkpoint={"asynchronous": asynchronous})
    for failed, problem, steps, left in run_ranks(2, _meet_a_full_disk, config.model_dump(), full):
        assert failed == 1
        assert f"rank {full}: " in problem
        assert "File too large" in problem
        assert "\n" not in problem
        assert steps == [1, 4]
        assert left == ["latest", "step-00000001", "step-00000004"]
    lines = [json.loads(line) for line in (config.run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["checkpoints_failed"] for line in lines] == [0, 0, 1, 1]
    assert lines[1]["checkpoint_stall_seconds"] > 0


def _meet_a_full_disk(tree: dict[str, Any], full: int) -> tuple[int, str | None, list[int], list[str]]:
    trainer = new_trainer(tree)
    saver, folder = trainer.saving.saver, trainer.run_dir / "checkpoints"
    trainer.train_step()
    _save(trainer)
    trainer.train_step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trainer.world.rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    _save(trainer)
    trainer.train_step()  # whose line of metrics.jsonl is not taken either, where it is rank 0's disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    problem = saver.last_problem
    dist.barrier()
    latest = find_latest(trainer.run_dir)
    assert latest is not None
    assert latest.step == 1
    trainer.train_step()
    _save(trainer)
    assert saver.last_problem is None
    trainer.close()
    return saver.failed, problem, [one.step for one in find_all(trainer.run_dir)], sorted(os.listdir(folder))


def _save(trainer: Trainer) -> None:
    trainer.save()
    trainer.saving.saver.wait()


def test_a_run_whose_end_cannot_be_saved_fails(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, schedule={"steps": 2}, checkpoint={"every_steps": 1})
    assert run_ranks(2, _lose_the_folder, config.model_dump()) == [1, 1]
    assert [one.step for one in find_all(tmp_path / "test" / "aside")] == []


def _lose_the_folder(tree: dict[str, Any]) -> int:
    trainer = new_trainer(tree)
    folder = trainer.run_dir / "checkpoints"
    trainer.train_step()
    dist.barrier()
    if trainer.world.is_main:  # what root meets in the place of a folder without permission
        folder.rename(trainer.run_dir / "aside")
        folder.write_text("a file")
    dist.barrier()
    trainer.train_step()
    code = trainer.finish()
    trainer.close()
    return code


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path)
    config.run.path.mkdir()
    (config.run.path / "checkpoints").write_text("a file")
    with pytest.raises(
        RuntimeError, match=r"UsageError: .*checkpoints: File exists: no checkpoint can be written there"
    ):
        run_ranks(2, new_trainer, config.model_dump())


def test_room_is_asked_for_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    assert check_space(tmp_path, 1000, keep=4, best=False) is None
    warning = check_space(tmp_path, 1000, keep=4, best=True)
    assert warning is not None
    assert "6 checkpoints of 1.0 kB" in warning
    with pytest.raises(UsageError, match=r"takes 2\.6 kB and stays .*, but only 5\.0 kB are free"):
        check_space(tmp_path, 2600, keep=1, best=False)
    (tmp_path / "checkpoints" / "old").write_bytes(bytes(200))
    assert check_space(tmp_path, 2600, keep=1, best=False) is None, "the run's own checkpoints give way"


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    run_ranks(1, _save_some, tmp_path, [(1, 0.7), (2, 0.9), (3, None), (4, 0.8), (5, 0.9), (6, None)])
    assert [one.step for one in find_all(tmp_path)] == [2, 5, 6]
    assert find(tmp_path / "checkpoints" / "best").step == 2
    assert find(tmp_path).step == 6
    run_ranks(1, _save_some, tmp_path, [(7, 0.95), (8, None), (9, None)])
    assert [one.step for one in find_all(tmp_path)] == [7, 8, 9]


def test_after_a_return_to_an_earlier_step_the_latest_is_the_last_written(tmp_path: Path) -> None:
    run_ranks(1, _save_some, tmp_path, [(10, 0.5), (20, 0.5), (5, 0.5)])
    assert find(tmp_path).step == 5
    (tmp_path / "checkpoints" / "latest").unlink()
    assert find(tmp_path).step == 5
    run_ranks(1, _save_some, tmp_path, [(20, 0.6)])
    assert find(tmp_path).state()["evaluation"]["pairs"]["accuracy"] == 0.6
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["best", "latest", "step-00000005", "step-00000020"]


def _save_some(run_dir: Path, saves: list[tuple[int, float | None]]) -> None:
    for step, accuracy in saves:
        assert write(run_dir, content(step, accuracy), keep=2, best=Best("accuracy", "pairs", "max")) is None


def test_a_better_network_is_saved_at_once(folder: Path, tmp_path: Path) -> None:
    config = configuration(
        folder,
        tmp_path,
        evaluation={"every_steps": 2, "pairs": [str(folder / "pairs.bin")]},
        checkpoint={"every_steps": 1000, "keep": 1, "best": {"metric": "auc"}},
    )
    train(2, config)
    evaluations = [json.loads(line) for line in (config.run.path / "evaluation.jsonl").read_text().splitlines()]
    values = {line["step"]: line["auc"] for line in evaluations if line["step"] > 0}
    champion = max(values, key=lambda step: (values[step], -step))
    assert find(config.run.path / "checkpoints" / "best").step == champion
    assert [one.step for one in find_all(config.run.path)] == sorted({champion, 8})


@pytest.mark.parametrize(
    ("best", "message"),
    [
        ({"set": "none"}, "checkpoint.best.set: 'none' is none of evaluation.pairs and evaluation.sets: pairs"),
        ({"metric": "tar_at_far_1e-6"}, "checkpoint.best.metric: tar_at_far_1e-6 is not measured on 'pairs'"),
    ],
)
def test_a_best_that_is_not_measured_is_wrong_use(
    folder: Path, tmp_path: Path, best: dict[str, Any], message: str
) -> None:
    pairs = {"pairs": [str(folder / "pairs.bin")]}
    config = configuration(folder, tmp_path, evaluation=pairs, checkpoint={"best": best})
    with pytest.raises(RuntimeError, match=f"UsageError: {message}"):
        run_ranks(1, new_trainer, config.model_dump())


def test_minutes_make_a_checkpoint_due(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, checkpoint={"every_minutes": 1e-9, "keep": 10})
    run_ranks(2, _train_by_the_clock, config.model_dump())
    assert [one.step for one in find_all(config.run.path)] == [1, 2, 3]


def _train_by_the_clock(tree: dict[str, Any]) -> None:
    trainer = new_trainer(tree)
    for _ in range(3):
        trainer.train_step()
        trainer.consult()
        assert trainer.save_wanted
        trainer.save()
    trainer.close()


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ranks(1, _write_steps, tmp_path, 3)
    latest = find_latest(tmp_path)
    assert latest is not None
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", _killed)
        with pytest.raises(KeyboardInterrupt):
            go_back(find_all(tmp_path)[1], [latest])
    assert [one.step for one in find_all(tmp_path)] == [1, 2]
    after = find_latest(tmp_path)
    assert after is not None
    assert after.step == 2
    assert_is_of_its_step(after)


def _killed(path: Path, **_kwargs: Any) -> None:
    if path.exists():
        raise KeyboardInterrupt


def _write_steps(run_dir: Path, count: int) -> None:
    for step in range(1, count + 1):
        assert write(run_dir, content(step), keep=count) is None
