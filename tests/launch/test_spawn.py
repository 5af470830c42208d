"""Ranks start, fail and stop together; the error that is shown is the one that caused the end."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pfc.launch.spawn import run_ranks

# A shell starts what it puts in the background with SIGINT ignored, which all children inherit: not so here.
COMMAND = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from pfc.launch.spawn import run_ranks; sys.exit(run_ranks(sys.argv[1:], 2))"
)
Run = Callable[[str], tuple[int, str, str]]

# What every script below starts with: a gloo world, and an end as pfc.launch.train ends it.
RANK = """
    import os, signal, sys, time
    rank = int(os.environ["RANK"])

    class UsageError(Exception): pass

    def join():
        global torch, dist
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()

    def end(function):
        from torch.distributed.elastic.multiprocessing.errors import record
        try:
            record(function)()
        except UsageError:
            sys.exit(2)
        except Exception:
            sys.exit(1)
"""


def script(tmp_path: Path, body: str) -> str:
    path = tmp_path / "rank.py"
    path.write_text(textwrap.dedent(RANK) + textwrap.dedent(body), encoding="utf-8")
    return str(path)


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs two ranks of a script: exit code, stdout and stderr of all processes together."""

    def run(body: str) -> tuple[int, str, str]:
        exit_code = run_ranks([script(tmp_path, body)], 2)
        return exit_code, *capfd.readouterr()

    return run


def start(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """The same, by a command that can be sent a signal."""
    command = [sys.executable, "-c", COMMAND, script(tmp_path, body)]
    return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)


def assert_ended(process_id: int) -> None:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{process_id}").exists():
        assert time.monotonic() < deadline, f"process {process_id} was left behind"
        time.sleep(0.05)


def test_ranks_meet_and_end_well(run: Run):
    exit_code, out, error = run(
        """
        join()
        value = torch.tensor(float(rank + 1))
        dist.all_reduce(value)
        sys.stdout.write(f"{value.item()} {os.environ['WORLD_SIZE']} {os.environ['MASTER_ADDR']}\\n")
        dist.destroy_process_group()
        """,
    )
    assert (exit_code, error) == (0, "")
    assert out.splitlines() == ["3.0 2 127.0.0.1"] * 2


def test_an_exception_on_one_rank_ends_the_job_and_is_shown_last(run: Run):
    exit_code, _, error = run(
        """
        def train():
            join()
            if rank == 1:
                raise ValueError("the cause")
            dist.all_reduce(torch.zeros(1))
            time.sleep(600)
        end(train)
        """,
    )
    assert exit_code == 1
    lines = error.splitlines()
    assert lines[-1] == "ValueError: the cause"
    assert "pfc: rank 1 of 2 failed:" in lines
    assert error.count("Traceback") == 1


def test_a_rank_that_sleeps_through_the_failure_is_killed(run: Run):
    exit_code, out, error = run(
        """
        def train():
            if rank == 1:
                raise ValueError("the cause")
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(os.getpid(), flush=True)
            time.sleep(600)
        end(train)
        """,
    )
    assert exit_code == 1
    assert error.splitlines()[-1] == "ValueError: the cause"
    for line in out.splitlines():
        assert_ended(int(line))


def test_a_killed_rank_ends_the_job(run: Run):
    exit_code, _, error = run(
        """
        def train():
            join()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.zeros(1))
        end(train)
        """,
    )
    assert exit_code == 1
    assert error.splitlines()[-1] == ("pfc: rank 1 of 2 was killed by SIGKILL; the machine may have run out of memory")


def test_wrong_use_found_by_all_ranks_is_told_once(run: Run):
    exit_code, _, error = run(
        """
        def train():
            raise UsageError("labels.bin: label 7 is outside [0, 5)")
        end(train)
        """,
    )
    assert (exit_code, error) == (2, "pfc: labels.bin: label 7 is outside [0, 5)\n")


def test_wrong_use_found_by_one_rank_is_told_once(run: Run):
    exit_code, _, error = run(
        """
        def train():
            join()
            if rank == 1:
                raise UsageError("bad label")
            dist.all_reduce(torch.zeros(1))
        end(train)
        """,
    )
    assert (exit_code, error) == (2, "pfc: bad label\n")


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
    process = start(tmp_path, STOPPABLE)
    wait_for(tmp_path / "started-0", tmp_path / "started-1")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert "Traceback" not in stderr
    assert (tmp_path / "saved-0").read_text() == (tmp_path / "saved-1").read_text() == "saved"


def test_a_second_interrupt_ends_it_at_once(tmp_path: Path):
    body = STOPPABLE.replace("time.sleep(0.2)", "time.sleep(600)")
    process = start(tmp_path, body)
    assert process.stderr is not None
    wait_for(tmp_path / "started-0", tmp_path / "started-1")
    process.send_signal(signal.SIGINT)
    assert any("Ctrl-C again" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    for rank in range(2):
        assert_ended(int((tmp_path / f"started-{rank}").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_ranks_do_not_outlive_a_killed_command(tmp_path: Path):
    body = """
        from pfc.launch.train import _die_with, PARENT
        _die_with(int(os.environ[PARENT]))
        open(f"started-{rank}", "w").write(str(os.getpid()))
        time.sleep(600)
    """
    process = start(tmp_path, body)
    wait_for(tmp_path / "started-0", tmp_path / "started-1")
    process.kill()
    process.wait()
    for rank in range(2):
        assert_ended(int((tmp_path / f"started-{rank}").read_text()))


def test_cores_are_shared_between_the_ranks_unless_told_otherwise(run: Run, monkeypatch: pytest.MonkeyPatch):
    body = "sys.stdout.write(os.environ['OMP_NUM_THREADS'] + '\\n')"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    expected = max(1, len(os.sched_getaffinity(0)) // 2)
    assert run(body)[1].split() == [str(expected)] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run(body)[1].split() == ["3"] * 2
