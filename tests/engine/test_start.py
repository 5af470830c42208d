"""Where a run begins or goes on: the first rank decides, and a restart of the same command loses nothing."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from pfc.data.errors import UsageError
from pfc.engine import start
from pfc.engine.checkpoint import find, find_all, write
from tests.engine.checkpoint.test_checkpoint import content
from tests.engine.runs import configuration, new_trainer, pack, train
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("data"))


def test_a_restart_with_a_path_goes_on_from_what_that_start_has_saved(folder: Path, tmp_path: Path) -> None:
    train(2, configuration(folder, tmp_path / "other"), steps=2)
    path = str(find(tmp_path / "other" / "test").path)
    config = configuration(folder, tmp_path / "runs")
    train(2, config, steps=3, resume=path)
    assert [one.step for one in find_all(config.run.path)] == [5]
    lines = train(2, config, steps=1, resume=path)
    assert [line["step"] for line in lines] == [3, 4, 5, 6], "it goes on, and the lines stay"
    assert [line["step"] for line in train(2, config, resume="auto")] == [3, 4, 5, 6, 7, 8]
    # From another path it goes back: these checkpoints come from another start.
    back = str(find_all(config.run.path)[0].path)
    assert [line["step"] for line in train(2, config, steps=1, resume=back)] == [3, 4, 5, 6]


def test_a_requeued_job_that_was_to_begin_goes_on(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path)
    train(1, config, steps=3, resume="never")
    (config.run.path / "requeue").touch()  # as SIGUSR1 leaves it
    assert [line["step"] for line in train(1, config, resume="never")] == list(range(1, 9))
    assert not (config.run.path / "requeue").exists(), "its wish is granted"
    other = configuration(folder, tmp_path / "auto")
    train(1, other, steps=3)
    with pytest.raises(RuntimeError, match=r"UsageError: .* holds a run that got to step 3"):
        train(1, other, resume="never")


def resumed_at(tree: dict[str, Any]) -> int:
    """On a rank: where it goes on, where the second rank alone sees no checkpoint."""
    hidden = mock.patch.object(start.checkpoint, "find_latest", return_value=None)
    with hidden if dist.get_rank() else nullcontext():
        trainer = new_trainer(tree)
    trainer.close()
    return trainer.step


def test_the_first_rank_chooses_the_checkpoint_for_all(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path)
    train(2, config, steps=3)
    assert run_ranks(2, resumed_at, config.model_dump()) == [3, 3]


def elsewhere(tree: dict[str, Any], folders: list[str]) -> None:
    start._PATIENCE = 0.5  # network disks get a minute
    os.chdir(folders[dist.get_rank()])
    new_trainer(tree).close()


def test_a_run_directory_that_is_not_shared_is_found_at_the_start(folder: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for one in folders:
        one.mkdir()
    tree = configuration(folder, Path("runs")).model_dump()
    with pytest.raises(RuntimeError, match=r"UsageError: .*host1/runs/test on .* \(rank 1\) is not the folder that"):
        run_ranks(2, elsewhere, tree, [str(one) for one in folders])
    assert not list(folders[0].glob("runs/test/*")), "and nothing is left there"


def own_batch(tree: dict[str, Any]) -> None:
    tree["data"]["batch_size"] += dist.get_rank()
    new_trainer(tree).close()


def test_ranks_with_different_configurations_do_not_begin(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"UsageError: rank 1 \(.*\) was given another configuration than rank 0"):
        run_ranks(2, own_batch, configuration(folder, tmp_path).model_dump())


def write_apart(runs: list[str]) -> str | None:
    return write(Path(runs[dist.get_rank()]), content(7), keep=1)


def test_files_that_the_first_rank_does_not_see_are_no_checkpoint(tmp_path: Path) -> None:
    runs = [tmp_path / "host0", tmp_path / "host1"]
    (runs[1] / "checkpoints" / ".step-00000007.partial").mkdir(parents=True)
    for problem in run_ranks(2, write_apart, [str(one) for one in runs]):
        assert problem is not None
        assert problem.startswith("rank 0: __1_0.distcp: rank 0 does not see this file of another rank")
    assert find_all(runs[0]) == []


def refused_at_once(tree: dict[str, Any], resume: str) -> str:
    """On a rank: what the start is refused with, before any rank looks for the first one's file."""
    with mock.patch("pfc.engine.start._appears", side_effect=AssertionError("waits for a file that is never made")):
        try:
            new_trainer(tree, resume)
        except UsageError as error:
            return str(error)
    return ""


def test_no_rank_waits_where_the_first_one_refuses(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path)
    for told in run_ranks(2, refused_at_once, config.model_dump(), str(tmp_path / "nowhere")):
        assert "no such run or checkpoint" in told
