"""What was trained with the common PyTorch implementation becomes a run of pfc.

Its files: ``model.pt``, the backbone's state_dict; and ``checkpoint_gpu_{rank}.pt``, one of every rank, with the
backbone, that rank's rows of the centers, and the state of one optimizer over both.
"""

import itertools
import os
import re
import shutil
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path

import torch
from torch import Tensor

from ...data.errors import UsageError
from ..checkpoint import Piece, save_alone
from ..checkpoint.state import versions
from ..config import Config, parse_config
from ..torch_files import TorchFile, listed
from .backbone import find_network
from .optimizer import OptimizerState, read_optimizer

_RANK_FILE = re.compile(r"checkpoint_gpu_(\d+)\.pt")


@dataclass
class Conversion:
    """What was brought in; ``num_classes`` is None without centers, ``epoch`` where the file does not say."""

    out: Path
    backbone: str
    embedding_dim: int
    image_size: tuple[int, int]
    ranks: int = 0
    num_classes: int | None = None
    step: int = 0
    epoch: int | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        height, width = self.image_size
        lines = [f"backbone   {self.backbone}, embedding_dim {self.embedding_dim}, images of {height}×{width}"]
        if self.num_classes is not None:
            lines.append(f"centers    {self.num_classes:,} × {self.embedding_dim}, of {self.ranks} rank(s)")
            epoch = "" if self.epoch is None else f", epoch {self.epoch}"
            lines.append(f"counters   step {self.step:,}{epoch}; the order of samples starts over")
        lines += [f"note       {note}" for note in self.notes]
        lines.append(f"wrote      {self.out}")
        if self.num_classes is not None:
            lines.append(f"go on      pfc train CONFIG.yaml --resume {self.out}")
        return "\n".join(lines)


def convert(
    source: Path, out: Path, *, backbone: str | None = None, image_size: tuple[int, int] | None = None
) -> Conversion:
    """Writes the run ``out`` with one checkpoint.

    Args:
        source: a model.pt, or the folder with the checkpoint_gpu_{rank}.pt of all ranks.
        out: the run's directory; must not hold anything yet.
        backbone: name of the network; by the numbers of its blocks when None.
        image_size: (height, width) in pixels of its input; a square by the input of ``fc`` when None.

    Raises:
        UsageError: the files are not what they should be, or ``out`` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already and is not empty: give another directory")
    ranks = _rank_files(source)
    first = ranks[0] if ranks else _backbone_file(source)
    weights = first.tensors("state_dict_backbone") if ranks else first.tensors()
    network = find_network(first.path, weights, backbone, image_size)
    result = Conversion(out, network.name, network.embedding_dim, network.image_size)
    tensors = {f"backbone/{key}": value for key, value in network.weights.items()}
    pieces: dict[str, list[Tensor]] = {}
    optimizer = OptimizerState()
    if ranks:
        result.ranks, result.step = len(ranks), _step(ranks)
        epoch = first.at("epoch")
        result.epoch = epoch if isinstance(epoch, int) else None
        centers = _centers(ranks, result.embedding_dim)
        result.num_classes = sum(len(rows) for rows in centers)
        optimizer = read_optimizer(ranks, network.parameters, centers)
        tensors |= {f"backbone_optimizer/{key}": value for key, value in optimizer.backbone.items()}
        pieces = {"head/centers": centers} | {f"head_optimizer/{key}": rows for key, rows in optimizer.head.items()}
        result.notes += optimizer.notes
    else:
        result.notes.append("no centers in it: evaluate, embed and export work, training cannot go on from it")
    if first.not_loaded:
        result.notes.append(f"not loaded, because pfc does not need it: {listed(first.not_loaded)}")
    _write(result, tensors, pieces, _config(result, optimizer))
    return result


def _rank_files(source: Path) -> list[TorchFile]:
    """The checkpoints of all ranks, in their order; none where there is a model.pt alone."""
    if not source.is_dir():
        return []
    names = {int(match[1]): path for path in source.iterdir() if (match := _RANK_FILE.fullmatch(path.name))}
    missing = sorted(set(range(max(names, default=0))) - names.keys())
    if missing:
        raise UsageError(
            f"{source}: checkpoint_gpu_{missing[0]}.pt is missing, there are those of ranks up to {max(names)}: "
            "each holds other centers, so all of them are needed"
        )
    return [TorchFile.read(path) for _, path in sorted(names.items())]


def _backbone_file(source: Path) -> TorchFile:
    if source.is_dir():
        if not (source / "model.pt").is_file():
            raise UsageError(f"{source} holds neither checkpoint_gpu_0.pt nor model.pt: give the folder that has them")
        source = source / "model.pt"
    file = TorchFile.read(source)
    if file.at("state_dict_softmax_fc") is not None:
        raise UsageError(f"{source} is the checkpoint of one rank: give its folder, with those of all ranks")
    return file


def _step(ranks: list[TorchFile]) -> int:
    steps = [file.integer("global_step") for file in ranks]
    for file, step in zip(ranks, steps, strict=True):
        if step != steps[0]:
            raise UsageError(
                f"{file.path} is of step {step}, {ranks[0].path} of step {steps[0]}: take all from one save"
            )
    return steps[0]


def _centers(ranks: list[TorchFile], embedding_dim: int) -> list[Tensor]:
    """Each rank's rows [rows, D]."""
    centers = []
    for file in ranks:
        rows = file.tensors("state_dict_softmax_fc").get("weight")
        if rows is None or rows.ndim != 2 or rows.shape[1] != embedding_dim:
            found = "missing" if rows is None else list(rows.shape)
            raise UsageError(
                f"{file.path}: state_dict_softmax_fc.weight is {found}, expected [rows, {embedding_dim}], "
                f"the backbone's embedding_dim being {embedding_dim}"
            )
        centers.append(rows)
    total = sum(len(rows) for rows in centers)
    each, longer = divmod(total, len(centers))
    for rank, (file, rows) in enumerate(zip(ranks, centers, strict=True)):
        expected = each + (rank < longer)
        if len(rows) != expected:
            raise UsageError(
                f"{file.path} holds {len(rows):,} centers, expected {expected:,} of {total:,} over {len(ranks)} ranks: "
                "the files are not of one run"
            )
    return centers


def _config(result: Conversion, optimizer: OptimizerState) -> Config:
    """What the files tell of the configuration; the rest is pfc's defaults."""
    return parse_config(
        {
            "run": {"name": re.sub(r"[^\w.-]", "-", result.out.resolve().name)},
            "data": {"train": "(converted: give data.train)", "image_size": list(result.image_size)},
            "backbone": {"name": result.backbone, "embedding_dim": result.embedding_dim},
            "head": {"num_classes": result.num_classes},
            "optimizer": optimizer.sections,
            "schedule": {"steps": max(1, result.step)},
        }
    )


def _joined(parts: list[Tensor]) -> list[Piece]:
    """Each rank's rows as a piece, float32 on disk."""
    total = sum(len(rows) for rows in parts)
    starts = itertools.accumulate((len(rows) for rows in parts), initial=0)
    return [Piece(rows, start, total, torch.float32) for rows, start in zip(parts, starts, strict=False)]


def _write(result: Conversion, tensors: dict[str, Tensor], pieces: dict[str, list[Tensor]], config: Config) -> None:
    """The run, under a temporary name until it is complete."""
    place = result.out.resolve()
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint = partial / "checkpoints" / f"step-{result.step:08d}"
    state = {
        "step": result.step,
        "position": 0,
        "head_steps": result.step,
        "num_classes": result.num_classes,
        "skipped_steps": 0,
        "scaler": torch.amp.GradScaler("cpu").state_dict(),  # a fresh one, for a run that goes on in fp16
        "world_size": max(1, result.ranks),
        "converted": True,
        "versions": versions(),
    }
    try:
        checkpoint.mkdir(parents=True)
        save_alone(checkpoint, tensors, {name: _joined(parts) for name, parts in pieces.items()})
        for folder in (partial, checkpoint):
            (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        (checkpoint / "state.json").write_text(dumps(state, indent=1), encoding="utf-8")
        os.rename(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
