"""The lines that a run prints besides its progress: at its beginning, after an evaluation, at its end."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...data import GeneratedDataset
from ...partial_fc.device import default_keep_bytes
from ...partial_fc.kernels.probabilities import MAX_SCALE, probability_bytes
from ...partial_fc.kernels.products import operand_dtype, rounds_to_bfloat16
from ...partial_fc.objectives import LogSumExpObjective, SoftplusObjective
from ..build import products_of
from ..checkpoint import Found
from ..config import Config, Objective
from ..evaluation.figures import headline
from ..ranks.distributed import World
from ..training_data import Dataset, decoding_threads
from .damage import NAME as DAMAGED
from .damage import DamageTally
from .telemetry import read_json_lines


def opening(
    config: Config,
    dataset: Dataset,
    epoch_size: int,
    network: nn.Module,
    world: World,
    total_steps: int,
    start: Found | None,
) -> list[str]:
    """What the run is made of, and the numbers that follow from its configuration."""
    head, size = config.head, config.data.image_size or [0, 0]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    images_per_step = config.images_per_step(world.size)
    epochs = total_steps * images_per_step / epoch_size
    rates = f"sample_rate {head.sample_rate:g}, batch_rate {head.batch_rate:g}"
    lines = [
        f"data       {dataset.name}: {len(dataset):,} images of {_source(config, dataset)}",
        f"backbone   {config.backbone.name}, {parameters / 1e6:.2f} M parameters, input {size[0]}×{size[1]}, "
        f"{config.precision}",
        f"head       {_shown(head.objective)}, {dataset.num_classes:,} × "
        f"{f'{head.sub_centers} × ' * (head.sub_centers > 1)}{config.backbone.embedding_dim} centers over "
        f"{world.size} rank(s), {rates}",
        *_storage(config),
        *_probabilities(config, dataset.num_classes, world),
        *_precision(config, world),
        f"schedule   {total_steps:,} steps of {images_per_step:,} images ({epochs:.1f} epochs) on {world.size} × "
        f"{world.device.type}",
    ]
    if start is None:
        return lines
    again = "; its centers are copied into a new file, no other is read" if head.storage == "file" else ""
    return [*lines, f"resumed    {start.path}{again}"]


def _storage(config: Config) -> list[str]:
    head = config.head
    if head.storage == "device" and head.center_dtype == "float32":
        return []
    folder = head.storage_dir or config.run.path
    where = {"device": "on the device", "host": "in host memory", "file": f"in a file in {folder}"}[head.storage]
    return [f"storage    centers and their state {where}, in {head.center_dtype}"]


def evaluated(values: dict[str, Any], step: int) -> str:
    """One evaluation, a line of evaluation.jsonl."""
    told = [f"{title} {value}" for title, value in headline(values)]
    return f"evaluated  {values['set']} at step {step:,}: {'   '.join(told)}   ({values['seconds']:.1f} s)"


def closing(run_dir: Path, report: Path, sets: list[str], damage: DamageTally) -> list[str]:
    """What every set says next to the untrained network's, what was damaged, and where to look."""
    told = []
    evaluations = read_json_lines(run_dir / "evaluation.jsonl")
    for name in sets:
        of_set = [line for line in evaluations if line["set"] == name]
        if not of_set:  # named after the run had come to its end
            continue
        before = of_set[0] if of_set[0]["step"] == 0 else {}
        leading, first = headline(of_set[-1])[:2], dict(headline(before))
        pairs = "accuracy" in of_set[-1]
        shown = [leading[0][1]] if pairs else [f"{title} {value}" for title, value in leading]
        untrained = [first[title] for title, _ in leading[: len(shown)] if title in first]
        at_first = f"   (untrained network: {', '.join(one.split(' ')[0] for one in untrained)})" if untrained else ""
        told.append(f"{'accuracy' if pairs else 'judged':<10} {', '.join(shown)} on {name}{at_first}")
    if damage.records:
        told.append(
            f"damaged    {damage.records:,} record(s), replaced {damage.replaced:,} times: see {run_dir / DAMAGED}"
        )
    return [*told, f"run        {run_dir}", f"report     {report}"]


def _source(config: Config, dataset: Dataset) -> str:
    """Whose images they are, and what makes them."""
    if isinstance(dataset, GeneratedDataset):
        return f"{dataset.active:,} of {dataset.num_classes:,} identities, computed when they are needed"
    return (
        f"{dataset.num_classes:,} identities, decoded on the {config.data.decode.upper()} by "
        f"{decoding_threads(config)} thread(s) a rank"
    )


def _probabilities(config: Config, num_classes: int, world: World) -> list[str]:
    """Whether a step keeps its probabilities or makes them again, at each of the run's sample rates.

    The micro-batches of a step share what may be kept: the first ones keep theirs.

    Nothing for objectives that have no such choice.
    """
    head, objective = config.head, config.head.objective.build().at(0)
    exponential = isinstance(objective, LogSumExpObjective) and objective.scale <= MAX_SCALE
    if not exponential and not isinstance(objective, SoftplusObjective):
        return []
    batch = math.ceil(head.batch_rate * config.data.batch_size * world.size)
    dtype = operand_dtype(products_of(config), world.device)
    allowed = default_keep_bytes(world.device) if head.keep_mib is None else head.keep_mib << 20
    told = []
    for rate in dict.fromkeys([head.sample_rate, *(later for _, later in head.sample_rate_schedule)]):
        rows = math.ceil(rate * -(-num_classes // world.size)) * head.sub_centers
        size, passes = probability_bytes(batch, rows, dtype), config.optimizer.accumulate
        kept = sum(size * number <= allowed for number in range(1, passes + 1))
        done, each = "kept" if kept else "recomputed", f" for each of {passes} micro-batches" * (passes > 1)
        if 0 < kept < passes:
            done, each = f"kept of {kept} micro-batches, recomputed of {passes - kept}", " for each"
        told.append(
            f"sampling   {round(rate * num_classes):,} of {num_classes:,} classes on {world.size} rank(s); "
            f"probabilities {done} ({size / 2**20:,.1f} MiB a rank{each}, {allowed >> 20:,} allowed)"
        )
    return told


def _precision(config: Config, world: World) -> list[str]:
    """Where bf16 is asked for and this processor does not multiply the head's operands in it."""
    products = products_of(config)
    if products == torch.float32 or (products == torch.bfloat16 and rounds_to_bfloat16(world.device)):
        return []
    if products == "tf32" and world.device.type != "cpu":
        return []
    return ["precision  this processor makes the head's products in float32, not as asked for (see pfc doctor)"]


def _shown(objective: Objective) -> str:
    """``d_softmax (scale 16.0, stop 0.5)``"""
    told = [
        f"{name} {_moving(value) if isinstance(value, dict) else value}"
        for name, value in (objective.model_extra or {}).items()
        if value is not None
    ]
    return f"{objective.name} ({', '.join(told)})" if told else objective.name


def _moving(entries: dict[str, Any]) -> str:
    """A number that follows the steps."""
    return f"{entries['start']:g} → {entries['end']:g}, {entries['shape']}"
