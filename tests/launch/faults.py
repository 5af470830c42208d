"""Runs that are killed at random moments and started again, compared with one that was left alone.

    python -m tests.launch.faults 20 [--seed 0]

Every other run is killed inside a save; half are started again by torchrun, half by the same command. All must end
with the same bits as the run without a fault.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pfc.data import pack_synthetic
from pfc.engine import checkpoint
from tests.launch.conftest import PFC

FAULTY = Path(__file__).parent / "faulty"
STEPS, SAVE_EVERY = 12, 3
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CONFIG = """
run: {{name: whole, dir: {folder}/runs}}
data: {{train: {folder}/set, batch_size: 4, threads: 1}}
backbone: {{name: small, embedding_dim: 16, options: {{width: 8}}}}
head: {{sample_rate: 0.5}}
schedule: {{steps: {steps}, warmup_steps: 1}}
evaluation: {{pairs: []}}
checkpoint: {{every_steps: {every}}}
log: {{every_steps: 1, tensorboard: false}}
"""


@dataclass
class Ended:
    """How a command ended."""

    exit_code: int
    output: str
    """Of stdout and stderr together."""

    @property
    def last(self) -> str:
        return self.output.rstrip().splitlines()[-1]


def run(command: Sequence[str], *, fault: dict[str, Any] | None = None, timeout: float = 120.0) -> Ended:
    """Runs a command with a fault, and everything that it started to its end with it."""
    process = start(command, fault=fault)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Ended(process.returncode, output)


def start(command: Sequence[str], *, fault: dict[str, Any] | None = None) -> subprocess.Popen[str]:
    """The same, without waiting for its end."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if fault is not None:
        environment |= {"FAULT": json.dumps(fault), "PYTHONPATH": str(FAULTY)}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def write_config(folder: Path) -> Path:
    """A data set and the configuration of a tiny run; returns the latter's path."""
    pack_synthetic(folder / "set", identities=6, images_per_identity=4, size=32, workers=1)
    path = folder / "faults.yaml"
    path.write_text(CONFIG.format(folder=folder, steps=STEPS, every=SAVE_EVERY), encoding="utf-8")
    return path


def train(config: Path, *options: str) -> list[str]:
    """``pfc train`` on two ranks."""
    return [*PFC, "train", str(config), "--nproc", "2", *options]


def torchrun(config: Path, *options: str, restarts: int = 0) -> list[str]:
    """The same by torchrun."""
    return [*TORCHRUN, f"--max-restarts={restarts}", "-m", "pfc.launch.train", str(config), *options]


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Everything in the run's last checkpoint."""
    found = checkpoint.find(run_dir)
    assert found.step == STEPS, f"{run_dir} got to step {found.step} only"
    return checkpoint.load(found, {}, ("",))


def killed_run(config: Path, number: int, seed: int) -> str:
    """One run that is killed once and started again, to its end; returns what was done to it."""
    chance = random.Random(f"{seed}-{number}")
    name = f"killed-{number}"
    fault = {
        "kind": "kill",
        "place": ("update", "save")[number % 2],
        "rank": chance.randrange(2),
        "step": chance.randint(1, STEPS),
        "delay": chance.uniform(0, 0.1),
        "once": str(config.parent / f"{name}.once"),
    }
    by_torchrun = number // 2 % 2 == 0
    told = f"{name}: rank {fault['rank']} in its {fault['place']} at step {fault['step']} or after"
    if by_torchrun:
        ended = run(torchrun(config, f"run.name={name}", restarts=2), fault=fault)
    else:
        ended = run(train(config, f"run.name={name}"), fault=fault)
        if Path(fault["once"]).exists() and ended.exit_code != 0:
            assert "SIGKILL" in ended.last, ended.output
            ended = run(train(config, f"run.name={name}"), fault=fault)
    assert ended.exit_code == 0, ended.output
    happened = "killed" if Path(fault["once"]).exists() else "not killed: the run was over"
    return f"{told}, {happened}, started again by {'torchrun' if by_torchrun else 'pfc train'}"


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors whose bits differ."""
    return [name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])]


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs that are killed and started again.")
    parser.add_argument("runs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder))
        assert run(train(config)).exit_code == 0
        whole = final_tensors(Path(folder) / "runs/whole")
        for number in range(arguments.runs):
            told = killed_run(config, number, arguments.seed)
            different = differences(whole, final_tensors(Path(folder) / f"runs/killed-{number}"))
            print(f"{told}: {'bit for bit the same' if not different else f'DIFFERENT: {different}'}", flush=True)
            bad += bool(different)
    print(f"{arguments.runs - bad} of {arguments.runs} runs ended as the run without a fault, bit for bit")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
