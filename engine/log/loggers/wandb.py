"""Weights & Biases: ``pip install 'pfc[wandb]'``; WANDB_MODE=offline writes into the run's folder alone."""

import os
import secrets
from typing import Any

from ....data.errors import UsageError
from ..hooks import Hook, RunInfo, Values, numbers


class WandB(Hook):
    """Options are those of ``wandb.init``: project (pfc), entity, group, tags, mode, ..."""

    def __init__(self, **options: Any) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError("log.loggers: wandb is not installed: pip install 'pfc[wandb]'") from None
        mode = options.get("mode") or os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.login(prompt=False, verify=False):  # it would ask, and all ranks wait
            raise UsageError("log.loggers: wandb knows no key: run `wandb login`, or set WANDB_MODE=offline")
        self.wandb, self.options = wandb, options

    def start(self, run: RunInfo) -> None:
        noted = run.directory / "wandb.id"  # so that a run that goes on is the same one there
        if not (run.resumed_step and noted.exists()):
            noted.write_text(secrets.token_hex(4), encoding="utf-8")
        common = {"project": "pfc", "name": run.directory.name, "id": noted.read_text(encoding="utf-8").strip()}
        self.run = self.wandb.init(
            **{**common, **self.options}, dir=str(run.directory), config=dict(run.config), resume="allow"
        )
        self.run.define_metric("*", step_metric="step")  # its own may only rise, and a run may go back

    def step(self, step: int, values: Values) -> None:
        self.run.log({"step": step, **{f"train/{key}": value for key, value in numbers(values).items()}})

    def evaluation(self, step: int, values: Values) -> None:
        prefix = f"evaluation/{values.get('set', '')}/"
        self.run.log({"step": step, **{prefix + key: value for key, value in numbers(values).items()}})

    def end(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)
