"""Runs that are killed at random moments and started again, compared with one that was left alone.

    python -m tests.launch.faults 20 [--seed 0]

Every other run is killed inside a save; half are started again by torchrun, half by the same command. All must end
with the same bits as the run without a fault.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pfc.data import pack_synthetic
from pfc.engine import checkpoint
from tests import commands
from tests.commands import Command, run_pfc
from tests.launch.faulty.sitecustomize import install

FAULTY = Path(__file__).parent / "faulty"
STEPS, SAVE_EVERY = 12, 3
TORCHRUN = ["--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
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


def train(config: Path, *options: str, fault: dict[str, Any] | None = None) -> Command:
    """Starts ``pfc train`` on two ranks, with a fault in one of them."""
    arguments = ["train", str(config), "--nproc", "2", *options]
    return Command(_with_fault, fault, run_pfc, arguments, environment=ENVIRONMENT, merged=True)


def torchrun(config: Path, *options: str, restarts: int = 0, fault: dict[str, Any] | None = None) -> Command:
    """The same by torchrun, whose ranks are processes of their own."""
    arguments = [*TORCHRUN, f"--max-restarts={restarts}", "-m", "pfc.launch.train", str(config), *options]
    environment = ENVIRONMENT
    if fault is not None:
        environment = ENVIRONMENT | {"FAULT": json.dumps(fault), "PYTHONPATH": str(FAULTY)}
    return commands.torchrun(*arguments, environment=environment, merged=True)


def _with_fault(fault: dict[str, Any] | None, function: Callable[..., int], *arguments: Any) -> int:
    """The ranks are forks of this process, with all that was changed in it."""
    if fault is not None:
        install(fault)
    return function(*arguments)


def write_config(folder: Path) -> Path:
    """A data set and the configuration of a tiny run; returns the latter's path."""
    pack_synthetic(folder / "set", identities=6, images_per_identity=4, size=32, workers=1)
    path = folder / "faults.yaml"
    path.write_text(CONFIG.format(folder=folder, steps=STEPS, every=SAVE_EVERY), encoding="utf-8")
    return path


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
        ended = torchrun(config, f"run.name={name}", restarts=2, fault=fault).wait()
    else:
        ended = train(config, f"run.name={name}", fault=fault).wait()
        if Path(fault["once"]).exists() and ended.exit_code != 0:
            assert "SIGKILL" in ended.last, ended.output
            ended = train(config, f"run.name={name}", fault=fault).wait()
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
        assert train(config).wait().exit_code == 0
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
