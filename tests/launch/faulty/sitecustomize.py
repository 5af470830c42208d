"""Breaks one rank of a training run on purpose; Python imports it by itself where PYTHONPATH names its folder.

FAULT in the environment says what: ``{"kind": "kill", "rank": 1, "step": 7, "once": "path"}``. The file ``once`` is
made when the fault happens, and where it exists nothing happens: a restarted run is left in peace.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BROKEN_SECONDS = 100_000


def act(fault: dict[str, Any]) -> None:
    """What happens at the chosen place."""
    once = Path(fault["once"])
    if once.exists():
        return
    once.touch()
    kind = fault["kind"]
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "hang":
        time.sleep(BROKEN_SECONDS)
    elif kind == "hang in C":
        ctypes.PyDLL(None).sleep(BROKEN_SECONDS)  # keeps the interpreter's lock
    elif kind == "out of memory":
        import torch

        raise torch.OutOfMemoryError(f"made to fail in the {fault['place']}")
    elif kind == "raise":
        raise ValueError(f"made to fail in the {fault['place']}")


def install(fault: dict[str, Any]) -> None:
    """Puts the fault into the place ``fault["place"]``, at step ``fault["step"]`` counted from 1."""
    from pfc.data.loading.loader import TrainLoader
    from pfc.engine import training_step
    from pfc.engine.backbones.small import SmallNet
    from pfc.engine.checkpoint import manager
    from pfc.partial_fc import PartialFC

    step = 0

    def before(owner: Any, name: str, do: Callable[[Any], None]) -> None:
        original = getattr(owner, name)

        def changed(*arguments: Any, **options: Any) -> Any:
            if os.environ.get("RANK") == str(fault["rank"]):
                do(arguments)
            return original(*arguments, **options)

        setattr(owner, name, changed)

    def at_step(_: Any) -> None:
        if step == fault["step"]:
            act(fault)

    def count(_: Any) -> None:
        nonlocal step
        step += 1

    def spoil(arguments: Any) -> None:
        if step >= fault["step"]:
            arguments[1][1] = float("nan")  # the second image

    def in_a_save(_: Any) -> None:
        if step >= fault["step"]:
            threading.Timer(fault["delay"], act, [fault]).start()

    before(TrainLoader, "__next__", count)
    place = fault["place"]
    if place == "loader":
        before(TrainLoader, "__next__", at_step)
    elif place == "backbone":
        before(SmallNet, "forward", at_step)
    elif place == "head":
        before(PartialFC, "forward", at_step)
    elif place == "update":
        before(training_step.TrainingStep, "update", at_step)
    elif place == "images":
        before(training_step.TrainingStep, "micro_batch", spoil)
    elif place == "save":
        before(manager, "write", in_a_save)


if "FAULT" in os.environ and "pfc.launch.train" in sys.orig_argv:
    install(json.loads(os.environ["FAULT"]))
