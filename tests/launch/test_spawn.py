"""Ranks start, fail and stop together; the error that is shown is the one that caused the end."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pfc.data.errors import UsageError
from pfc.launch.machine import default_ranks, usable_cores
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


def test_what_ranks_are_forked_from_can_fork():
    """It has no threads, has not asked CUDA, nor imported DALI, which might."""
    code = (
        "import os, sys; from pfc.launch.rank import preload; preload('pfc.engine.trainer'); "
        "print(len(os.listdir('/proc/self/task')), sys.modules['torch'].cuda.is_initialized(), 'nvidia' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert told.stdout == "1 False False\n", told.stderr


def test_a_fork_that_fails_ends_the_ranks_that_there_are(tmp_path: Path):
    ended = Command(with_one_fork, str(tmp_path)).wait(30)
    assert (ended.exit_code, ended.last) == (7, "rank 1 of 2 could not be started: Resource temporarily unavailable")
    (rank,) = (int(path.name) for path in tmp_path.iterdir())
    assert_ended(rank)


def with_one_fork(folder: str) -> int:
    fork = os.fork

    def once() -> int:
        if any(Path(folder).iterdir()):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        process = fork()
        if process:
            (Path(folder) / str(process)).touch()
        return process

    os.fork = once
    try:
        return run_ranks(time.sleep, 2)  # never called
    except UsageError as error:
        print(error)
        return 7


def test_an_interrupt_of_every_process_does_not_end_ranks_before_they_have_saved(tmp_path: Path):
    """What pkill -INT pfc does."""
    command = start(tmp_path, STOPPABLE)
    wait_until(lambda: written(tmp_path / "started-0", tmp_path / "started-1"))
    for rank in range(2):
        os.kill(int((tmp_path / f"started-{rank}").read_text()), signal.SIGINT)
    command.send_signal(signal.SIGINT)
    assert command.wait(60).exit_code == 130
    assert written(tmp_path / "saved-0", tmp_path / "saved-1")


def test_ranks_end_although_the_command_was_started_with_sigchld_ignored(tmp_path: Path):
    assert Command(without_sigchld, str(tmp_path)).wait(30).exit_code == 0


def without_sigchld(folder: str) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    return run_ranks(int, 2)


def test_a_rank_reads_nothing_from_the_commands_input(run: Run):
    assert run("print(os.readlink('/proc/self/fd/0'))").out.splitlines() == ["/dev/null"] * 2


def test_a_finished_run_ends_well_where_its_output_is_closed():
    assert Command(with_closed_output).wait(30).exit_code == 0


def with_closed_output() -> int:
    os.close(1)
    sys.stdout = None
    return run_ranks(int, 2)


@pytest.mark.parametrize(("found", "expected"), [(3, 3), (0, min(2, usable_cores()))])
def test_one_rank_for_each_gpu(monkeypatch: pytest.MonkeyPatch, found: int, expected: int):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: found)
    assert default_ranks() == expected


def test_gpus_that_cannot_be_counted_are_not_one(monkeypatch: pytest.MonkeyPatch):
    def fail() -> int:
        raise RuntimeError("driver and library do not match")

    monkeypatch.setattr("torch.accelerator.device_count", fail)
    with pytest.raises(UsageError, match=r"counted \(RuntimeError: driver and library do not match\): see pfc doctor"):
        default_ranks()
