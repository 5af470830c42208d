"""Ranks that are killed, fail, hang, or are told to stop: the job ends, says why, and goes on where it was."""

import signal
import socket
import sys
from pathlib import Path

import pytest

from pfc.engine.checkpoint import find
from pfc.launch.train import main
from tests.commands import Command, wait_until
from tests.launch import faults

HANG_SECONDS = "run.timeout_seconds=6"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.write_config(tmp_path_factory.mktemp("faults"))


def fault(tmp_path: Path, kind: str, place: str, step: int = 3) -> dict[str, object]:
    return {"kind": kind, "place": place, "rank": 1, "step": step, "once": str(tmp_path / "once")}


def test_killed_runs_end_with_the_bits_of_one_that_was_left_alone(config: Path):
    """Nor do torchrun's differ from those of pfc train. python -m tests.launch.faults 20 does this for more of them,
    started again by the same command too."""
    runs = config.parent / "runs"
    assert faults.train(config).wait().exit_code == 0
    whole = faults.final_tensors(runs / "whole")
    assert {"head/centers", "rng/1/cpu"} <= whole.keys()
    told = faults.killed_run(config, 1, seed=0)  # inside a save, started again by torchrun
    assert not faults.differences(whole, faults.final_tensors(runs / "killed-1")), told


def test_the_error_of_the_rank_that_failed_is_last(config: Path, tmp_path: Path):
    ended = faults.train(config, f"run.dir={tmp_path}", fault=fault(tmp_path, "raise", "loader")).wait(60)
    assert ended.exit_code == 1
    assert ended.last == "ValueError: made to fail in the loader"
    assert ended.output.count("Traceback") == 1
    assert "pfc: rank 1 of 2 failed:" in ended.output


def test_torchrun_too_shows_the_error_of_the_rank_that_failed(config: Path, tmp_path: Path):
    ended = faults.torchrun(config, f"run.dir={tmp_path}", fault=fault(tmp_path, "out of memory", "head")).wait(60)
    assert ended.exit_code == 1
    _, _, cause = ended.output.partition("Root Cause")
    assert "rank      : 1 (local_rank: 1)" in cause
    assert "OutOfMemoryError: made to fail in the head" in cause
    assert "PeerFailed" not in cause


def test_a_rank_that_hangs_is_named_with_its_stack(config: Path, tmp_path: Path):
    ended = faults.train(config, f"run.dir={tmp_path}", HANG_SECONDS, fault=fault(tmp_path, "hang", "loader")).wait(60)
    assert ended.exit_code == 1
    assert ended.last.startswith("Hang: rank 1 of 2 (")
    assert "stands still in step" in ended.last
    assert "waiting for a batch" in ended.last
    assert "; rank 0 waits in all_gather" in ended.last
    assert "time.sleep(BROKEN_SECONDS)" in ended.output, "its stack"


def test_a_rank_that_is_stopped_is_named_by_the_others(config: Path, tmp_path: Path):
    ended = faults.train(config, f"run.dir={tmp_path}", HANG_SECONDS, fault=fault(tmp_path, "stop", "update")).wait(60)
    assert ended.exit_code == 1
    assert ended.last.startswith("Hang: rank 1 of 2 gave no sign of life")
    assert "rank 0 waits in all_reduce" in ended.last


@pytest.mark.parametrize(("asked", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_stopped_run_saves_and_sigusr1_asks_to_be_started_again(
    config: Path, tmp_path: Path, asked: signal.Signals, exit_code: int
):
    """That torchrun hands the signal on, tests/launch/clusters/test_slurm.py shows."""
    options = [f"run.dir={tmp_path}", "schedule.steps=100000", "checkpoint.every_steps=100000", "log.every_steps=10"]
    run_dir = tmp_path / "whole"
    command = faults.train(config, *options)
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: command.poll() is not None or (metrics.exists() and metrics.read_text()))
    assert not (run_dir / "requeue").exists()
    command.send_signal(asked)
    ended = command.wait(60)
    assert ended.exit_code == exit_code, ended.output
    assert f"stopped by {asked.name} at step {find(run_dir).step:,}" in ended.output
    assert "Traceback" not in ended.output
    assert (run_dir / "requeue").exists() == (asked == signal.SIGUSR1)


def test_wrong_use_is_told_once_under_torchrun_too(config: Path, tmp_path: Path):
    ended = faults.torchrun(config, f"run.dir={tmp_path}", "head.num_classes=99").wait(60)
    assert ended.exit_code == 1, "torchrun's own"
    lines = [line for line in ended.output.splitlines() if line.startswith("pfc: ")]
    assert len(lines) == 1, ended.output
    assert "head.num_classes is 99" in lines[0]


@pytest.mark.parametrize(("rank", "address"), [(0, "127.0.0.1"), (1, "no-such-host.invalid")])
def test_a_rank_whose_peers_never_come_does_not_wait_for_ever(config: Path, rank: int, address: str):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again at the end of the block
    alone = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": address, "MASTER_PORT": port}
    variables = {name: str(value) for name, value in alone.items()}
    ended = Command(rank_of_torchrun, [str(config), "run.timeout_seconds=2"], environment=variables).wait(60)
    assert ended.exit_code == 1
    assert f"TimeoutError: the ranks did not meet at {address}:" in ended.error.splitlines()[-1]


def rank_of_torchrun(arguments: list[str]) -> int:
    sys.argv[1:] = arguments
    return main()
