"""Which part of a step takes how long, and what it does there, from steps that are profiled apart from the timed ones.

A profiled step is cut into forward, backward and row update, with the device idle at each cut. Inside them the
profiler's operators (on a GPU: kernels) are put together by kind. What no operator accounts for is ``other``: Python,
launches, waiting. The ranks' exchange and the class sample are timed as a whole, whatever they consist of.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ...partial_fc import PartialFC
from ...partial_fc import step as head_step
from ...partial_fc.kernels import native
from ..ranks import Rank
from .heads import Head

PARTS: tuple[str, ...] = ("forward", "backward", "update")
KINDS: tuple[str, ...] = ("products", "rows", "elementwise", "exchange", "sample", "other")
"""Matrix products; rows gathered, scattered or, by the compiled passes, measured and updated; exponentials, sums, norms
and all else that walks through numbers; between the ranks; the choice of the classes; the rest."""

_PREFIX = "pfc bench: "
_WHOLE = ("exchange", "sample")
_BY_NAME = (  # of operators on a CPU, of kernels on a GPU, of the compiled passes of either
    ("exchange", re.compile(r"nccl|gloo|c10d::")),
    ("products", re.compile(r"aten::(addmm|baddbmm|bmm|mm)_?$|gemm|cutlass|nvjet|powers_kernel")),
    (
        "rows",
        re.compile(
            r"index|gather|scatter|pfc_(?!exponentials)|(normalize|own|project|write|sgd|adamw|adagrad)_kernel",
            re.IGNORECASE,
        ),
    ),
)


def kind_of(name: str) -> str:
    """Which of ``KINDS`` the operator or kernel of that name is."""
    return next((kind for kind, pattern in _BY_NAME if pattern.search(name)), "elementwise")


def profiled(
    head: Head, rank: Rank, batch: Callable[[], tuple[Tensor, Tensor]], steps: int
) -> dict[str, dict[str, float]]:
    """Part → kind → seconds a step on rank 0; on the other ranks, which only take part, nothing.

    Args:
        batch: makes the embeddings and labels of a step.
    """
    activities = [ProfilerActivity.CUDA] * (rank.device.type == "cuda") + [ProfilerActivity.CPU]
    watched = rank.number == 0
    with profile(activities=activities) if watched else nullcontext() as profiler, _labelled(head, rank):
        for _ in range(steps):
            embeddings, labels = batch()
            rank.wait()
            with _span("forward", rank):
                loss = head.module(embeddings, labels)
            with _span("backward", rank):
                loss.backward()
            with _span("update", rank):
                head.optimizer.step()
                head.optimizer.zero_grad()
    if profiler is None:
        return {}
    times = _grouped(list(profiler.events() or []), rank.device.type)
    return {part: {kind: seconds / steps for kind, seconds in kinds.items()} for part, kinds in times.items()}


@contextmanager
def _span(name: str, rank: Rank) -> Iterator[None]:
    rank.synchronize()
    with record_function(_PREFIX + name):
        yield
        rank.synchronize()


@contextmanager
def _labelled(head: Head, rank: Rank) -> Iterator[None]:
    """Inside, the calls that are timed as a whole, and the compiled passes, appear in the profile under their names."""
    calls: list[tuple[Any, str, str]]
    if isinstance(head.module, PartialFC):
        calls = [(head.module.exchange, name, "exchange") for name in ("gather_batch", "sum", "sum_and_scatter")]
        calls.append((head_step, "draw_sample", "sample"))
    else:
        calls = [(dist, name, "exchange") for name in ("all_gather", "all_reduce", "reduce")]
    if (passes := native.passes()) is not None:
        calls += [(passes, name, name) for name in vars(passes) if name.startswith("pfc_")]
    with ExitStack() as stack:
        for owner, name, label in calls:
            stack.enter_context(patch.object(owner, name, _in_span(getattr(owner, name), label, rank)))
        yield


def _in_span(function: Callable[..., Any], name: str, rank: Rank) -> Callable[..., Any]:
    def labelled(*args: Any, **kwargs: Any) -> Any:
        with _span(name, rank):
            return function(*args, **kwargs)

    return labelled


def _grouped(events: Sequence[Any], device: str) -> dict[str, dict[str, float]]:
    """Seconds by part and kind. Each operator counts with the time of its own, in the innermost span that holds it."""
    named = [
        (event.name.removeprefix(_PREFIX), event.time_range.start, event.time_range.end)
        for event in events
        if event.name.startswith(_PREFIX) and event.device_type == DeviceType.CPU
    ]
    parts = _Spans([span for span in named if span[0] in PARTS])
    whole = _Spans([span for span in named if span[0] in _WHOLE])
    counted = [(name, start, end - start) for name, start, end in whole.spans]
    for event in events:
        name, start = event.name.removeprefix(_PREFIX), event.time_range.start
        if name in PARTS + _WHOLE or whole.at(start) or (event.device_type == DeviceType.CUDA) != (device == "cuda"):
            continue
        counted.append(
            (kind_of(name), start, getattr(event, f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"))
        )
    times = {part: dict.fromkeys(KINDS, 0.0) for part in PARTS}
    for part, start, end in parts.spans:
        times[part]["other"] += end - start
    for kind, start, own in counted:
        part = parts.at(start)
        if part is not None:
            times[part][kind] += own
            times[part]["other"] -= own
    return {part: {kind: max(time, 0.0) * 1e-6 for kind, time in kinds.items()} for part, kinds in times.items()}


class _Spans:
    """Stretches of time with names, to be asked which of them holds a moment."""

    def __init__(self, spans: list[tuple[str, float, float]]) -> None:
        self.spans = sorted(spans, key=lambda span: span[1])
        self._starts = [start for _, start, _ in self.spans]

    def at(self, moment: float) -> str | None:
        """The latest begun one's name, if it has not ended."""
        place = bisect_right(self._starts, moment) - 1
        return self.spans[place][0] if place >= 0 and moment < self.spans[place][2] else None
