"""What only a GPU can show of a whole run (docs/devices.md).

``make test-gpu`` runs it on a GPU. Without one a little of it runs on the CPU, so that the tests themselves are right.
"""

import itertools
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("yaml")
pytest.importorskip("pydantic", reason="the engine's configuration needs pydantic")
pytest.importorskip("nvidia.dali", reason="training reads its images through NVIDIA DALI")

from pfc.engine.checkpoint import find_all, find_latest
from pfc.engine.config import Config
from pfc.engine.log.telemetry import read_json_lines
from pfc.launch.cli import main
from tests.commands import Command, pfc
from tests.engine.runs import configuration, pack

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 8
Case = tuple[str, str, bool]
"""Optimizer, precision, and whether images are NHWC and saves beside training."""
Lines = tuple[list[dict[str, Any]], list[dict[str, Any]]]
CASES: list[Case] = [("adamw", "bf16", True)]
if DEVICE == "cuda":
    CASES = list(itertools.product(["sgd", "adamw"], ["float32", "bf16", "fp16"], [False, True]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("data"))


def train(configs: Sequence[Config], *, stop_at: int = 0, poison: bool = False) -> None:
    """One rank in a process of its own trains them one after the other, on the GPU.

    Args:
        stop_at: each is left in the middle after a checkpoint at that step, and at the end the process is killed.
        poison: the first step of each is not finite.
    """
    paths = [config.run.path.with_suffix(".yaml") for config in configs]
    for path, config in zip(paths, configs, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config.to_yaml(), encoding="utf-8")
    done = Command(_on_rank, stop_at, poison, [str(path) for path in paths]).wait(600)
    assert done.exit_code == (-signal.SIGKILL if stop_at else 0), done.output


def _on_rank(stop_at: int, poison: bool, paths: Sequence[str]) -> None:
    """The process of ``train``."""
    from pfc.engine.config import load_config
    from pfc.engine.ranks import distributed
    from pfc.engine.trainer import Trainer

    left = []
    with distributed.start() as world:
        for path in paths:
            trainer = Trainer(load_config(path), world, "auto")
            if poison and trainer.step == 0:
                hook = trainer.network.register_forward_hook(lambda _module, _inputs, output: output * torch.nan)
                trainer.train_step()
                hook.remove()
            while trainer.step < (stop_at or trainer.total_steps):
                trainer.train_step()
            if stop_at:
                trainer.save()
                trainer.saving.saver.wait()
                trainer.train_step()
                left.append(trainer)
            else:
                trainer.finish()
                trainer.close()
        if stop_at:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def resumed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Lines]:
    """For each case the lines of a run that was not interrupted, and of one that was killed and went on."""
    runs = tmp_path_factory.mktemp("runs")
    straight, broken = (
        [
            configuration(
                folder,
                runs / kind / "-".join(map(str, case)),
                optimizer={
                    "backbone": {"name": case[0], "lr": 1e-3},
                    "head": {"name": f"row_{case[0]}", "lr": 1e-3},
                },
                backbone={"channels_last": case[2]},
                checkpoint={"asynchronous": case[2]},
                precision=case[1],
                schedule={"steps": STEPS},
            )
            for case in CASES
        ]
        for kind in ("straight", "broken")
    )
    train(straight, poison=True)
    train(broken, poison=True, stop_at=3)
    train(broken)
    pairs = zip(straight, broken, strict=True)
    lines = [[read_json_lines(one.run.path / "metrics.jsonl") for one in pair] for pair in pairs]
    return {case: (first, second) for case, (first, second) in zip(CASES, lines, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_killed_run_goes_on_as_if_it_had_not_been(resumed: dict[Case, Lines], case: Case) -> None:
    """With the first step forced to be not finite; to a tolerance, as a GPU's atomics add in any order."""
    straight, broken = resumed[case]
    assert [line["step"] for line in broken] == list(range(1, STEPS + 1))
    assert all(line["skipped_steps"] >= 1 for line in broken)
    wanted = [line["loss"] for line in straight[1:]]
    assert np.isfinite(wanted).all()
    assert [line["loss"] for line in broken[1:]] == pytest.approx(wanted, rel=2e-2)


def test_evaluate_embed_and_export_from_the_gpu(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path / "run", evaluation={"pairs": [str(folder / "pairs.bin")]})
    train([config])
    run = str(config.run.path)
    found = find_latest(config.run.path)
    assert found is not None
    assert found.step == STEPS
    assert main(["evaluate", run, "--pairs", str(folder / "pairs.bin"), "--device", DEVICE]) == 0
    for name, device in (("host", "cpu"), ("device", DEVICE)):
        assert main(["embed", run, str(folder / "train"), str(tmp_path / f"{name}.npy"), "--device", device]) == 0
    cosines = (np.load(tmp_path / "host.npy") * np.load(tmp_path / "device.npy")).sum(axis=1)
    assert cosines.min() > 0.999
    assert main(["export", run, str(tmp_path / "weights.safetensors")]) == 0


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU here")
def test_every_gpu_takes_a_rank(folder: Path, tmp_path: Path) -> None:
    """As many ranks as there are GPUs, over NCCL, with what only GPUs have; one more is refused in one line."""
    count = torch.cuda.device_count()
    backbone = {"options": {"width": 8, "norm": "batch"}, "sync_bn": True, "payload_dtype": "bf16"}
    config = configuration(folder, tmp_path / "all", run={"name": "all"}, backbone=backbone)
    path = tmp_path / "all.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert pfc("train", path, "--nproc", str(count)).exit_code == 0
    assert [one.step for one in find_all(config.run.path)] == [STEPS]
    assert pfc("train", path, "--nproc", str(count + 1), "run.name=more").exit_code == 2
