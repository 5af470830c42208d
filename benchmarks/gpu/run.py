"""What the parts of ``benchmarks/gpu/__main__.py`` share: its options, its findings, heads and batches, and the clock.

This folder imports torch and Triton alone, as does all that it imports.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from ...partial_fc import device as head_device
from ..ranks import Rank

Step = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        device: "cuda", or "cpu" for all of it in small.
        classes, dim, batch: C, D and B of the heads that are timed.
        rates: shares of the classes used each step, one line each.
        steps: timed ones of each line.
        keep_gib: GiB that pfc may keep the probabilities in between forward and update.
        peer: folder of the common implementation's head; not measured when None.
        out: folder of ``gpu.json``.
        seconds: after which nothing new is begun.
    """

    device: str
    classes: int
    dim: int
    batch: int
    rates: list[float]
    steps: int
    keep_gib: float
    peer: Path | None
    out: Path
    seconds: float


class GpuRun:
    """One run on one card.

    Args:
        begin: when it began, by ``time.monotonic``.
    """

    def __init__(self, options: Options, begin: float) -> None:
        self.options, self.begin = options, begin
        self.gpu = options.device == "cuda"
        self.device = torch.device(options.device)
        self.rank = Rank(0, 1, self.device)
        name = torch.cuda.get_device_name() if self.gpu else "CPU, interpreted"
        self.results: dict[str, Any] = {
            "device": name, "torch": torch.__version__, "triton": triton.__version__,
            "options": {key: str(value) for key, value in vars(options).items()},
            "failures": [], "steps": [],
        }  # fmt: skip
        print(name, torch.__version__, triton.__version__)

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() - self.begin > self.options.seconds

    def fail(self, message: str) -> None:
        self.results["failures"].append(message)
        print("FAILED", message, flush=True)

    def write(self) -> None:
        self.options.out.mkdir(parents=True, exist_ok=True)
        (self.options.out / "gpu.json").write_text(json.dumps(self.results, indent=1))

    def path(self, *, fused: bool) -> AbstractContextManager[object]:
        """Inside, steps take the fused kernels, on a CPU interpreted, or torch's own operations."""
        runs_on = head_device.runs_on if fused and self.gpu else lambda _: fused
        return patch.object(head_device, "runs_on", runs_on)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Endlessly a few batches of the timed heads, made before: their making is no part of a step.

        Embeddings [B, D] and labels int64 [B], of which two are the same.
        """
        options, made = self.options, []
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            embeddings = torch.randn(options.batch, options.dim, generator=generator).to(self.device).requires_grad_()
            labels = torch.randint(0, options.classes, (options.batch,), generator=generator)
            labels[1] = labels[0]
            made.append((embeddings, labels.to(self.device)))
        while True:
            for embeddings, labels in made:
                embeddings.grad = None
                yield embeddings, labels

    def times(self, function: Step, count: int) -> list[float]:
        """Milliseconds of each of ``count`` calls after untimed ones.

        On a GPU by its own clock, the calls queued one after the other as training does it, not each waited for.
        """
        for _ in range(3 if self.gpu else 1):
            function()
        if not self.gpu:
            seconds = []
            for _ in range(count):
                begin = time.perf_counter()
                function()
                seconds.append(time.perf_counter() - begin)
            return [1e3 * one for one in seconds]
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            function()
            mark.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairwise(marks)]

    def free(self) -> None:
        """Gives the memory of what is no longer used back to the device."""
        gc.collect()
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
