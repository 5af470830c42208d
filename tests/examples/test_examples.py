"""The examples: each trains on two ranks, and all come to the same losses."""

import importlib
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from pfc.launch.spawn import run_ranks
from tests.commands import Command, run_script

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
VARIABLES = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
OF_TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RESTART_COUNT": "0"}
OF_TORCHRUN |= {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
OTHERS = {"lightning_module": "lightning.pytorch", "accelerate_loop": "accelerate", "fsdp2_loop": "torch"}
"""Each with the library that it imports."""


def by_torchrun(name: str, *arguments: str) -> str:
    """What an example prints that is started as its first lines say."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "--local-addr", "localhost", str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, env={**os.environ, **VARIABLES}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def by_forks(name: str, library: str = "torch") -> str:
    """The same on ranks that need not import torch and the library again, in the environment that torchrun makes."""
    ended = Command(fork, str(EXAMPLES / f"{name}.py"), library, environment=VARIABLES | OF_TORCHRUN).wait(300)
    assert ended.exit_code == 0, ended.output
    return ended.out


def fork(path: str, library: str) -> int:
    importlib.import_module(library)
    sys.path.insert(0, str(EXAMPLES))  # where a script finds what lies beside it
    sys.argv[1:] = []
    return run_ranks(partial(run_script, path), 2)


def losses(told: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", told)}


def test_the_head_learns_the_same_in_every_trainer(tmp_path: Path) -> None:
    for library in ("lightning", "accelerate"):
        pytest.importorskip(library)
    plain = losses(by_torchrun("plain_loop", str(tmp_path / "checkpoint")))
    assert list(plain) == [10, 20, 30, 40]
    assert plain[40] < 0.8 * plain[10]
    assert (tmp_path / "checkpoint" / ".metadata").exists()
    for name, library in OTHERS.items():
        found = losses(by_forks(name, library))
        assert found[10] == pytest.approx(plain[10], rel=1e-4), name
        # Rounding grows: Accelerate deals the same batch out in another order.
        assert found == pytest.approx(plain, rel=1e-2), name


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name
