"""Small training runs for tests, on the ranks of the pool."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from pfc.data import RecordDataset, make_pairs, pack_synthetic, write_pairs
from pfc.engine.config import Config, parse_config
from pfc.engine.log.telemetry import read_json_lines
from pfc.engine.ranks.distributed import World
from pfc.engine.trainer import Trainer
from tests.ranks import run_ranks

IDENTITIES, PER_IDENTITY = 37, 6


def pack(folder: Path) -> Path:
    """A packed data set with pairs beside it: folder/train and folder/pairs.bin."""
    pack_synthetic(folder / "train", identities=IDENTITIES, images_per_identity=PER_IDENTITY, size=24, workers=1)
    write_pairs(folder / "pairs.bin", make_pairs(RecordDataset.open(folder / "train"), 60, seed=0))
    return folder


def configuration(folder: Path, runs: Path, **sections: Any) -> Config:
    """A run of 8 steps of a network without batch statistics; sections are merged over it."""
    tree: dict[str, Any] = {
        "run": {"name": "test", "dir": str(runs)},
        "data": {"train": str(folder / "train"), "batch_size": 6, "threads": 1},
        "backbone": {"name": "small", "embedding_dim": 32, "options": {"width": 8, "norm": "group"}},
        "head": {"objective": {"name": "cosface", "scale": 16.0, "margin": 0.2}},
        "optimizer": {"backbone": {"name": "sgd", "lr": 0.005}, "head": {"name": "row_sgd", "lr": 0.005}},
        "schedule": {"steps": 8},
        "evaluation": {"every_steps": 1000, "pairs": []},
        "checkpoint": {"every_steps": 1000},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return parse_config(tree)


def train(
    world_size: int, config: Config, *, steps: int | None = None, resume: str = "auto", report: bool = False
) -> list[dict[str, Any]]:
    """Trains on a pool of ranks, to the end or for some steps and a checkpoint; returns the lines of metrics.jsonl.

    report: write report.html, which takes longer than such a run.
    """
    run_ranks(world_size, train_on_rank, config.model_dump(), steps, resume, report)
    return read_json_lines(config.run.path / "metrics.jsonl")


def train_on_rank(tree: dict[str, Any], steps: int | None, resume: str, report: bool = False) -> None:
    torch.manual_seed(1234 + dist.get_rank())  # whatever the last test left behind must not matter
    trainer = new_trainer(tree, resume)
    try:
        for _ in range(steps if steps is not None else trainer.total_steps - trainer.step):
            trainer.train_step()
        if steps is None:
            with nullcontext() if report else patch("pfc.engine.trainer.write_report"):
                trainer.finish()
        else:
            trainer.save()
            trainer.saving.saver.wait()
    finally:
        trainer.close()


def new_trainer(tree: dict[str, Any], resume: str = "auto") -> Trainer:
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return Trainer(parse_config(tree), world, resume)


def final_tensors(tree: dict[str, Any]) -> dict[str, Tensor]:
    """On a rank: everything that the run's latest checkpoint restores, the centers whole."""
    trainer = new_trainer(tree)
    try:
        state = {f"network/{name}": value.clone() for name, value in trainer.network.state_dict().items()}
        state["centers"] = trainer.head.centers.full_tensor()
        state |= {
            f"objective/{name}": value.clone() for name, value in trainer.head.objective_state.state_dict().items()
        }
        for name, value in trainer.head_optimizer.state_dict()["state"].items():
            state[f"head_optimizer/{name}"] = value.full_tensor()
        for index, (parameter, values) in enumerate(trainer.backbone_optimizer.state.items()):
            state |= {f"optimizer/{index}/{key}": value.clone() for key, value in values.items()}
            # What fused kernels ask of it, wherever it was restored from.
            assert all(value.stride() == parameter.stride() for value in values.values() if value.ndim)
            assert all(value.device == parameter.device for value in values.values())
        return state
    finally:
        trainer.close()
