"""Files as the common implementation writes them, made here from pfc's own network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfc.engine import checkpoint
from pfc.engine.backbones import build_backbone

CLASSES, DIM, SIZE, STEP = 10, 16, 16, 7
ROWS = (4, 3, 3)  # of three ranks

Files = dict[int, dict[str, Any]]


def network() -> torch.nn.Module:
    torch.manual_seed(5)
    return build_backbone("iresnet18", embedding_dim=DIM, image_size=(SIZE, SIZE))


def files_of(weights: dict[str, Tensor], parameters: list[tuple[str, torch.Size]], kind: str = "sgd") -> Files:
    """Rank → content. All but the centers and their state is stored once, expanded, so that the files stay small."""
    head = len(parameters)
    if kind == "sgd":
        settings: dict[str, Any] = {"dampening": 0, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4}
        keys, steps = ["momentum_buffer"], {}
    else:
        settings = {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False}
        keys, steps = ["exp_avg", "exp_avg_sq"], {"step": torch.tensor(float(STEP))}
    settings |= {"lr": 0.05, "initial_lr": 0.1}
    state: dict[int, dict[str, Any]] = {
        number: {key: torch.tensor((number + 1) * 1e-5).expand(shape) for key in keys} | steps
        for number, (name, shape) in enumerate(parameters)
        if name != "features.weight"  # which is not trained
    }
    generator = torch.Generator().manual_seed(9)
    files = {}
    for rank, rows in enumerate(ROWS):
        own = {key: torch.rand(rows, DIM, generator=generator) for key in keys} | steps
        files[rank] = {
            "epoch": 3,
            "global_step": STEP,
            "state_dict_backbone": weights,
            "state_dict_softmax_fc": {"weight": torch.randn(rows, DIM, generator=generator)},
            "state_optimizer": {
                "state": state | {head: own},
                "param_groups": [settings | {"params": list(range(head))}, settings | {"params": [head]}],
            },
            "state_lr_scheduler": {"base_lrs": [0.1, 0.1], "last_epoch": STEP, "warmup_steps": 0, "_last_lr": [0.05]},
        }
    return files


def small_files(kind: str = "sgd") -> Files:
    with torch.device("meta"):
        model = network()
    weights = {
        name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in model.state_dict().items()
    }
    return files_of(weights, [(name, value.shape) for name, value in model.named_parameters()], kind)


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(exist_ok=True)
    for rank, content in files.items():
        torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
    return folder


def joined(files: Files, read: Callable[[dict[str, Any]], Tensor]) -> Tensor:
    return torch.cat([read(files[rank]) for rank in sorted(files)])


def head_state(key: str) -> Callable[[dict[str, Any]], Tensor]:
    return lambda content: content["state_optimizer"]["state"][len(content["state_optimizer"]["state"])][key]


def leave(folder: Path) -> Path:
    """Fills a folder as a run on three ranks leaves it, real weights and random statistics in it."""
    model = network()
    for name, value in model.named_buffers():
        if name.endswith(("mean", "var")):
            value.uniform_(0.5, 1.5)
    folder.mkdir()
    weights = model.state_dict()
    torch.save(weights, folder / "model.pt")
    files = files_of(weights, [(name, value.shape) for name, value in model.named_parameters()])
    none = {name: torch.zeros(()).expand(value.shape) for name, value in weights.items()}
    for rank in (1, 2):
        files[rank]["state_dict_backbone"] = none  # the first rank's counts
    return write(folder, files)


def read_all(run: Path) -> dict[str, Tensor]:
    found = checkpoint.find(run)
    return checkpoint.load(found, {}, ("backbone", "head"))
