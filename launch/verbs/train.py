"""``pfc train``: a training run on this machine."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...data.errors import UsageError


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's configuration.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key.sub=value]...", help="Values in place of the file's: data.batch_size=32."),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Ranks to start. [dim]\\[default: one for each GPU; without a GPU two, or one on a single core][/dim]",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="Where to go on: auto, at the run's latest checkpoint if it has one; never, from the start; "
            "or at the checkpoint PATH. Given once more, each goes on from what it has led to.",
        ),
    ] = "auto",
) -> int:
    """Train a backbone and its class centers.

    Starts the ranks itself, all on this machine: nccl between GPUs, gloo on the CPU. data.batch_size is per rank.
    For several machines: torchrun ... -m pfc.launch.train CONFIG.yaml [key.sub=value]...

    Ctrl-C or SIGTERM finishes the step, saves a checkpoint and ends; the same command then goes on from there.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UsageError("pfc train starts its ranks itself: under torchrun, run -m pfc.launch.train instead")
    from ...engine.config import load_config
    from ..machine import default_ranks
    from ..rank import preload
    from ..spawn import run_ranks

    # What is wrong in the file shows here, once, before any rank is started.
    settings = load_config(config, overrides)
    preload("pfc.engine.trainer")
    from ...engine.trainer import train

    return run_ranks(partial(train, settings, resume), nproc or default_ranks())
