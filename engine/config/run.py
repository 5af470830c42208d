"""One run, whole: its name, what it begins with, and all other sections."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from .data import Data
from .keeping import Checkpoint, Evaluation, Log
from .model import Backbone, Head
from .section import Count, CountOrZero, Section
from .training import Optimizer, Schedule, Spike


class Run(Section):
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "run"
    """Name of the run: the folder that it writes, under ``dir``."""
    dir: str = "runs"
    """Folder of all runs."""
    seed: CountOrZero = 0
    """Seed of everything random: centers, weights, the order of samples, class samples, flips."""
    timeout_seconds: Annotated[float, Field(ge=1)] = 600.0
    """A run that stands still for so long ends, and says which rank everyone waited for: see docs/failures.md."""
    consult_every_steps: Count | None = None
    """Steps between the ranks' questions to each other whether to stop, save or go back; each waits for the slowest. 1
    on a CPU, 10 on GPUs, when absent."""

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


class Init(Section):
    """What a new run begins with; a run that goes on from a checkpoint of its own has begun already."""

    path: str | None = None
    """A run, a checkpoint, or a file of the backbone's weights (.safetensors, or a state_dict in .pt)."""
    centers: Literal["new", "keep", "by_name"] = "new"
    """The centers: new ones; those of the same identities; or those that the names of the identities lead to."""

    @model_validator(mode="after")
    def _centers_of_something(self) -> "Init":
        if self.path is None and self.centers != "new":
            raise ValueError(f"centers is {self.centers!r}, which needs path: the run or checkpoint that has them")
        return self


class Config(Section):
    """One run, whole."""

    run: Run = Run()
    init: Init = Init()
    data: Data
    backbone: Backbone = Backbone()
    head: Head = Head()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Arithmetic of the backbone: bf16 and fp16 under autocast, fp16 with a GradScaler (GPU only)."""
    spike: Spike | None = None
    """A loss far above those before it; nothing is done about it when absent."""
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @model_validator(mode="after")
    def _one_exchange_a_step(self) -> "Config":
        if self.backbone.static_graph and self.optimizer.accumulate > 1:
            raise ValueError("backbone.static_graph needs optimizer.accumulate: 1 (DistributedDataParallel's own rule)")
        return self

    def images_per_step(self, world_size: int) -> int:
        """Images of all ranks in one optimizer step."""
        return self.data.batch_size * self.optimizer.accumulate * world_size

    @property
    def max_skipped_in_a_row(self) -> int:
        """Of ``optimizer``, and room for fp16: from 65536 down to 1 the loss's scale is halved 16 times."""
        return self.optimizer.max_skipped_in_a_row + (16 if self.precision == "fp16" else 0)

    def to_yaml(self) -> str:
        """The configuration with every default filled in."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
