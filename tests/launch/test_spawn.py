"""Ranks start, fail and stop together; the error that is shown is the one that caused the end."""

import os
import signal
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pfc.launch.spawn import run_ranks
from tests.commands import Command, Ended, run_script, wait_until

Run = Callable[[str], Ended]

# What every script below starts with.
RANK = """
    import os, signal, sys, time
    from pfc.data.errors import UsageError
    rank = int(os.environ["RANK"])

    def join():
        global torch, dist
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()
"""


def on_two_ranks(path: str) -> int:
    return run_ranks(partial(run_script, path), 2)


def start(tmp_path: Path, body: str, **environment: str) -> Command:
    """Runs a script on two ranks, by a command."""
    path = tmp_path / "rank.py"
    path.write_text(textwrap.dedent(RANK) + textwrap.dedent(body), encoding="utf-8")
    return Command(on_two_ranks, str(path), folder=tmp_path, environment=environment)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The same, to its end."""
    return lambda body: start(tmp_path, body).wait(60)


def written(*paths: Path) -> bool:
    return all(path.exists() and path.read_text() for path in paths)


def assert_ended(process_id: int) -> None:
    wait_until(lambda: not Path(f"/proc/{process_id}").exists(), 30, otherwise=f"process {process_id} was left behind")


def test_ranks_meet_and_end_well(run: Run):
    ended = run(
        """
        join()
        value = torch.tensor(float(rank + 1))
        dist.all_reduce(value)
        sys.stdout.write(f"{value.item()} {os.environ['WORLD_SIZE']} {os.environ['MASTER_ADDR']}\\n")
        dist.destroy_process_group()
        """,
    )
    assert (ended.exit_code, ended.error) == (0, "")
    assert ended.out.splitlines() == ["3.0 2 127.0.0.1"] * 2


def test_an_exception_on_one_rank_ends_the_job_and_is_shown_last(run: Run):
    ended = run(
        """
        def train():
            join()
            if rank == 1:
                raise ValueError("the cause")
            dist.all_reduce(torch.zeros(1))
            time.sleep(600)
        train()
        """,
    )
    assert ended.exit_code == 1
    lines = ended.error.splitlines()
    assert lines[-1] == "ValueError: the cause"
    assert "pfc: rank 1 of 2 failed:" in lines
    assert ended.error.count("Traceback") == 1


def test_a_rank_that_sleeps_through_the_failure_is_killed(run: Run):
    ended = run(
        """
        def train():
            if rank == 1:
                raise ValueError("the cause")
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(os.getpid(), flush=True)
            time.sleep(600)
        train()
        """,
    )
    assert ended.exit_code == 1
    assert ended.error.splitlines()[-1] == "ValueError: the cause"
    for line in ended.out.splitlines():
        assert_ended(int(line))


def test_a_killed_rank_ends_the_job(run: Run):
    ended = run(
        """
        def train():
            join()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.zeros(1))
        train()
        """,
    )
    assert ended.exit_code == 1
    assert ended.error.splitlines()[-1] == (
        "pfc: rank 1 of 2 was killed by SIGKILL; the machine may have run out of memory"
    )


def test_wrong_use_found_by_all_ranks_is_told_once(run: Run):
    ended = run(
        """
        def train():
            raise UsageError("labels.bin: label 7 is outside [0, 5)")
        train()
        """,
    )
    assert (ended.exit_code, ended.error) == (2, "pfc: labels.bin: label 7 is outside [0, 5)\n")


def test_wrong_use_found_by_one_rank_is_told_once(run: Run):
    ended = run(
        """
        def train():
            join()
            if rank == 1:
                raise UsageError("bad label")
            dist.all_reduce(torch.zeros(1))
        train()
        """,
    )
    assert (ended.exit_code, ended.error) == (2, "pfc: bad label\n")


STOPPABLE = """
    def save(*_):
        time.sleep(0.2)
        open(f"saved-{rank}", "w").write("saved")
        os._exit(0)
    signal.signal(signal.SIGTERM, save)
    open(f"started-{rank}", "w").write(str(os.getpid()))
    time.sleep(600)
"""


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_ranks_save(tmp_path: Path, number: signal.Signals, exit_code: int):
    command = start(tmp_path, STOPPABLE)
    wait_until(lambda: written(tmp_path / "started-0", tmp_path / "started-1"))
    command.send_signal(number)
    ended = command.wait(60)
    assert ended.exit_code == exit_code
    assert "Traceback" not in ended.error
    assert (tmp_path / "saved-0").read_text() == (tmp_path / "saved-1").read_text() == "saved"


def test_a_second_interrupt_ends_it_at_once(tmp_path: Path):
    command = start(tmp_path, STOPPABLE.replace("time.sleep(0.2)", "time.sleep(600)"))
    wait_until(lambda: written(tmp_path / "started-0", tmp_path / "started-1"))
    command.send_signal(signal.SIGINT)
    wait_until(lambda: "Ctrl-C again" in command.printed())
    command.send_signal(signal.SIGINT)
    assert command.wait(60).exit_code == 130
    for rank in range(2):
        assert_ended(int((tmp_path / f"started-{rank}").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_ranks_do_not_outlive_a_killed_command(tmp_path: Path):
    command = start(tmp_path, 'open(f"started-{rank}", "w").write(str(os.getpid())); time.sleep(600)')
    wait_until(lambda: written(tmp_path / "started-0", tmp_path / "started-1"))
    command.send_signal(signal.SIGKILL)
    assert command.wait(60).exit_code == -signal.SIGKILL
    for rank in range(2):
        assert_ended(int((tmp_path / f"started-{rank}").read_text()))


def test_cores_are_shared_between_the_ranks_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    body = """
        import torch
        sys.stdout.write(f"{os.environ['OMP_NUM_THREADS']} {torch.get_num_threads()}\\n")
    """
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    expected = max(1, len(os.sched_getaffinity(0)) // 2)
    assert start(tmp_path, body).wait().out.splitlines() == [f"{expected} {expected}"] * 2
    told = start(
        tmp_path, body.replace("import torch", "").replace("torch.get_num_threads()", "''"), OMP_NUM_THREADS="3"
    )
    assert told.wait().out.split() == ["3"] * 2


def test_nothing_that_forbids_a_fork_happens_before_it(run: Run):
    """Threads, CUDA, and DALI, which may ask for it: what ``pfc train`` imports starts none of them."""
    ended = run(
        """
        import torch
        print(len(os.listdir("/proc/self/task")), torch.cuda.is_initialized(), "nvidia.dali" in sys.modules)
        """
    )
    assert ended.out.splitlines() == ["1 False False"] * 2
