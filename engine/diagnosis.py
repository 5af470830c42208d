"""Where a loss or a gradient stops being finite: the batch is computed once more, and every layer is looked at."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.generated import GeneratedDataset
from ..data.loading.batches import Batch
from .training_data import Dataset
from .training_step import TrainingStep

_SHOWN = 16  # samples of a rank that are named


class NotFinite(RuntimeError):
    """Too many steps in a row were skipped; the message is the diagnosis."""


@dataclass(order=True)
class Finding:
    """The first thing on a rank that is not finite.

    Attributes:
        stage: 0 image, 1 parameter or activation of the backbone, 2 center, 3 loss, 4 gradient.
        index: its place within the stage: in forward order, for gradients backwards.
        what: in words.
        rows: which samples of the micro-batch, where it can be told.
        micro_batch: which one.
    """

    stage: int
    index: int
    what: str
    rows: tuple[int, ...] = ()
    micro_batch: int = 0


def diagnose(step: TrainingStep, batches: Sequence[Batch], dataset: Dataset, first_head_step: int) -> str:
    """Computes a step's forward and backward passes again, and tells what is not finite first. Called by all ranks.

    It leaves gradients and batch statistics behind that no step must use.

    Args:
        step: whose parameters are as they were before the step.
        batches: the micro-batches of this rank.
        dataset: that they come from.
        first_head_step: ``head.steps`` before them, so that the same classes are sampled.
    """
    step.parts.head.steps = first_head_step
    findings = [finding for place, batch in enumerate(batches) for finding in _look(step, batch, place)]
    first = min(findings, default=None)
    samples = _samples(batches[first.micro_batch if first else 0], first.rows if first else (), dataset)
    everyone: list[tuple[Finding | None, str]] = [(None, "")] * dist.get_world_size()
    dist.all_gather_object(everyone, (first, samples))
    found = [finding for finding, _ in everyone if finding is not None]
    if not found:
        lines = ["recomputed, the batch gives finite numbers only: some step before it did not"]
        concerned = list(range(len(everyone)))
    else:
        key = min((finding.stage, finding.index) for finding in found)
        concerned = [rank for rank, (f, _) in enumerate(everyone) if f and (f.stage, f.index) == key]
        told = everyone[concerned[0]][0]
        assert told is not None
        lines = [f"not finite first: {told.what}, on rank(s) {', '.join(map(str, concerned))}"]
    lines += [f"samples of rank {rank}: {everyone[rank][1]}" for rank in concerned[:4]]
    return "\n  ".join(lines)


def _look(step: TrainingStep, batch: Batch, place: int) -> list[Finding]:
    """All that is not finite in one micro-batch."""
    parts, findings = step.parts, []

    def note(stage: int, index: int, what: str, value: Tensor | None = None, *, by_sample: bool = False) -> None:
        if value is None or bool(torch.isfinite(value).all()):
            return
        rows: tuple[int, ...] = ()
        if by_sample and value.ndim and len(value) == len(batch.labels):
            rows = tuple((~torch.isfinite(value.detach()).flatten(1).all(dim=1)).nonzero().flatten().tolist())
        findings.append(Finding(stage, index, what, rows, place))

    note(0, 0, "the images", batch.images, by_sample=True)
    note(2, 0, "the centers of this rank", parts.head.centers.to_local())
    visited = 0

    def after(name: str, kind: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            nonlocal visited
            visited += 1
            index = visited
            for own, parameter in module.named_parameters(recurse=False):
                note(1, 2 * index, f"parameter {name}.{own} ({kind})", parameter.detach())
            if isinstance(output, Tensor):
                note(1, 2 * index + 1, f"activation of {name} ({kind})", output, by_sample=True)
                if output.requires_grad:
                    output.register_hook(
                        lambda gradient: note(4, -index, f"gradient by the activation of {name} ({kind})", gradient)
                    )

        return hook

    step.train()
    with ExitStack() as hooks:
        for name, module in parts.network.named_modules():
            if not any(module.children()):
                hook = module.register_forward_hook(after(name, type(module).__name__))
                hooks.callback(hook.remove)
        with step.autocast():
            embeddings = parts.network(batch.images)
        loss = parts.head(embeddings, batch.labels)
        note(3, 0, "the loss", loss.detach())
        parts.scaler.scale(loss / step.config.optimizer.accumulate).backward()
        note(4, -visited - 1, "gradient of the head", parts.head.gradient_scale.grad)
        for index, (name, parameter) in enumerate(parts.network.named_parameters()):
            note(4, index, f"gradient by parameter {name}", parameter.grad)
    return findings


def _samples(batch: Batch, rows: Sequence[int], dataset: Dataset) -> str:
    """``123 (photos/train.rec, key 124), …``: the samples of these rows, or of all."""
    ids = batch.samples.tolist()
    chosen = [ids[row] for row in rows] or ids
    told = []
    for sample in chosen[:_SHOWN]:
        if isinstance(dataset, GeneratedDataset):
            told.append(f"{sample} (generated, identity {int(dataset.labels(np.asarray(sample)))})")
            continue
        shard, position = dataset.locate(sample)
        told.append(f"{sample} ({shard.file.path}, key {int(shard.keys[position])})")
    return ", ".join(told) + (f" and {len(chosen) - _SHOWN} more" if len(chosen) > _SHOWN else "")
