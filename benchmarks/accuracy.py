"""``pfc bench accuracy``: variants of a configuration, each trained with several seeds and judged by its own pairs."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..data.errors import UsageError
from ..engine.config import load_config
from ..engine.log.telemetry import read_json_lines

_TRAIN = "from pfc.launch.cli import main; raise SystemExit(main())"
FIGURES = {"accuracy": "accuracy", "tar_at_far_1e-2": "TAR at FAR 1e-2", "eer": "EER"}
"""Of an evaluation, and what the table calls them."""


@dataclass
class Variant:
    """Some values in place of the configuration's, and what was found with them.

    Attributes:
        changes: as the command line of ``pfc train`` takes them, ``key.sub=value``.
        found: seed → data set of pairs → figures of the last evaluation.
    """

    name: str
    changes: list[str]
    found: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)

    def figure(self, pairs: str, name: str) -> tuple[float, float]:
        """Mean and standard deviation over the seeds; not a number where the evaluation has no such figure."""
        values = [found[pairs].get(name, math.nan) for found in self.found.values()]
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def read_variants(path: Path) -> list[Variant]:
    """A YAML file of name → {key.sub: value}.

    Raises:
        UsageError: it is no such file.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not tree:
        raise UsageError(f"{path}: variants are a mapping, name: {{key.sub: value}}")
    variants = []
    for name, changes in tree.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            raise UsageError(f"{path}: {name!r} is the name of a folder too: letters, digits, '.', '-' and '_'")
        if not isinstance(changes, dict):
            raise UsageError(f"{path}: {name}: expected {{key.sub: value}}, found {changes!r}")
        variants.append(Variant(name, [f"{key}={json.dumps(value)}" for key, value in changes.items()]))
    return variants


def measure(
    config: Path,
    overrides: list[str],
    variants: list[Variant],
    *,
    seeds: int,
    folder: Path,
    at_once: int,
    tell: Callable[[int, int, str], None],
) -> None:
    """Trains every variant with the seeds 0, 1, ..., one process each; what a folder has of them already is kept.

    Args:
        folder: of the runs.
        at_once: how many at the same time.
        tell: called with (done, of how many, which was done last).

    Raises:
        UsageError: a run was refused.
        RuntimeError: a run failed; its log says why.
    """
    for variant in variants:  # what is wrong is told before anything is trained
        settings = load_config(config, [*overrides, *variant.changes])
        if not settings.evaluation.pairs:
            raise UsageError(f"{config}: evaluation.pairs are what the variants are judged by: give some")
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(variant, seed) for seed in range(seeds) for variant in variants]
    with ThreadPoolExecutor(at_once) as pool:
        waiting = {pool.submit(_train, config, overrides, *task, folder): task for task in tasks}
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                variant, seed = waiting[future]
                variant.found[seed] = future.result()
                tell(done, len(tasks), f"{variant.name}, seed {seed}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for variant in variants:
        variant.found = dict(sorted(variant.found.items()))


def _train(config: Path, overrides: list[str], variant: Variant, seed: int, folder: Path) -> dict[str, Any]:
    name = f"{variant.name}-{seed}"
    told = folder / f"{name}.log"
    own = [f"run.name={name}", f"run.dir={folder}", f"run.seed={seed}", "data.threads=1"]
    command = ["train", str(config), *overrides, *variant.changes, *own, "--nproc", "1"]
    with told.open("w", encoding="utf-8") as log:
        ended = subprocess.run(
            [sys.executable, "-c", _TRAIN, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            check=False,
        )
    if ended.returncode:
        last = (told.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1]
        kind = UsageError if ended.returncode == 2 else RuntimeError
        raise kind(f"{name}: {last.removeprefix('pfc: ')} ({told})")
    return {line["set"]: line for line in read_json_lines(folder / name / "evaluation.jsonl")}


def table(variants: list[Variant]) -> list[tuple[list[str], list[list[str]]]]:
    """For each set of pairs the titles, and a row for each variant: mean ± standard deviation."""
    tables = []
    for pairs in next(iter(variants[0].found.values())):
        figures = [name for name in FIGURES if not math.isnan(variants[0].figure(pairs, name)[0])]
        rows = []
        for variant in variants:
            cells = [variant.figure(pairs, name) for name in figures]
            rows.append([variant.name, *(f"{mean:.4f} ± {deviation:.4f}" for mean, deviation in cells)])
        tables.append(([pairs, *(FIGURES[name] for name in figures)], rows))
    return tables
