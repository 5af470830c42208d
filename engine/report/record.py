"""What a run directory holds, read back for the report; pieces that are not there yet are simply absent."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import yaml
from numpy.typing import NDArray

from ...data.errors import UsageError
from ..evaluation.judgement import Judgement
from ..log.telemetry import read_json_lines

T = TypeVar("T")

CONFIG, METRICS, EVALUATION, SCORES = "config.yaml", "metrics.jsonl", "evaluation.jsonl", "evaluation"


@dataclass(frozen=True)
class Scores:
    """Cosines of one evaluation: ``cosine`` [P] float32, ``same`` [P] bool."""

    cosine: NDArray[np.float32]
    same: NDArray[np.bool_]


@dataclass(frozen=True)
class RunRecord:
    directory: Path
    config: dict[str, Any]
    config_text: str
    metrics: list[dict[str, Any]]
    """One object per logged step, by step."""
    evaluations: dict[str, list[dict[str, Any]]]
    """Set → its evaluations, by step."""

    def setting(self, *keys: str) -> Any:
        """The value at that path of the configuration, None where there is none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def series(self, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(steps, values) of one quantity in metrics.jsonl; NaN where null was written."""
        points = [(line["step"], line[key]) for line in self.metrics if key in line]
        values = np.array([(step, np.nan if value is None else value) for step, value in points], dtype=float)
        values = values.reshape(-1, 2)
        return values[:, 0], values[:, 1]

    def scores(self, name: str, step: int) -> Scores | None:
        return self._written(name, step, lambda arrays: Scores(arrays["cosine"], arrays["same"]))

    def judgement(self, name: str, step: int) -> Judgement | None:
        return self._written(name, step, Judgement.of)

    def _written(self, name: str, step: int, read: Callable[[Any], T]) -> T | None:
        """None where there is no such file, or none that is whole."""
        try:
            with np.load(self.directory / SCORES / f"{name}-{step:08d}.npz") as arrays:
                return read(arrays)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None


def read_run(directory: Path) -> RunRecord:
    """Reads a run directory.

    Raises:
        UsageError: it is not one.
    """
    config_path = directory / CONFIG
    if not config_path.is_file():
        raise UsageError(f"{directory} is not a run directory: there is no {CONFIG} in it")
    text = config_path.read_text(encoding="utf-8")
    lines = [line for line in read_json_lines(directory / EVALUATION) if "set" in line]
    evaluations = {
        name: _last_per_step([line for line in lines if line["set"] == name])
        for name in dict.fromkeys(line["set"] for line in lines)
    }
    metrics = _last_per_step(read_json_lines(directory / METRICS))
    return RunRecord(directory, yaml.safe_load(text) or {}, text, metrics, evaluations)


def _last_per_step(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step that was done again after a restart counts once."""
    by_step = {line["step"]: line for line in lines if "step" in line}
    return [by_step[step] for step in sorted(by_step)]
