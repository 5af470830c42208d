"""This machine as the planner needs it: what its ranks reach, all at work."""

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from ...engine.plan.machine import Machine
from ...partial_fc import device as devices
from ...partial_fc.kernels import native
from ..ceilings import DTYPES
from ..ranks import Rank, run
from .cases import BATCH, Steps, head_case, head_steps

_SIDE, _NUMBERS, _IMAGES = 2048, 1 << 26, 16
"""Of the square products; of the rows that are walked through, in float32; and of the convolution."""


def machine_here(ranks: int, dim: int, threads: int) -> Machine:
    """This machine as ``ranks`` ranks find it that are all at work: medians, so that other work on it counts.

    Args:
        dim: D of the rows that are read at random places.

    Raises:
        RankDied: a rank ended before it was done.
    """
    results = run(_ceilings, ranks, threads, dim)

    def mean(name: str) -> float:
        return statistics.fmean(result[name] for result in results)

    first = results[0]
    return Machine(
        name=first["name"],
        gpu=first["gpu"],
        memory=first["memory"],
        host_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        products={name: mean(name) for name in DTYPES if name in first},
        bandwidth=mean("bandwidth"),
        scattered=mean("scattered"),
        convolutions=mean("convolutions"),
        elementwise=mean("elementwise"),
        exponential=mean("exponential"),
        rounding=mean("rounding"),
        per_node=ranks,
        fused=first["fused"],
        overhead=mean("overhead"),
        threads=threads,
    )


def _ceilings(rank: Rank, dim: int) -> dict[str, Any]:
    gpu = rank.device.type != "cpu"
    found: dict[str, Any] = {"gpu": gpu, "name": "this machine", "memory": 0.0, "fused": devices.runs_on(rank.device)}
    if gpu:
        properties = torch.get_device_module(rank.device).get_device_properties(rank.device)
        found |= {"name": properties.name, "memory": float(properties.total_memory)}

    def median(work: Callable[..., object], *given: Tensor) -> float:
        steps = Steps(work, lambda: given, alone=not gpu)
        return statistics.median(steps.time(rank, steps=5, warmup=1)[1])

    side = 4 * _SIDE if gpu else _SIDE
    for name in DTYPES if gpu else ["float32"]:  # a CPU's operands are float32: kernels/products.py
        matrix = torch.ones(side, side, device=rank.device, dtype=DTYPES[name])
        found[name] = 2 * side**3 / median(lambda one, out: torch.mm(one, one, out=out), matrix, matrix.clone())
    rows = torch.ones(_NUMBERS // dim, dim, device=rank.device)
    found["bandwidth"] = 2 * rows.nbytes / median(lambda all_rows: all_rows.mul_(0.5), rows)
    places = torch.randperm(len(rows))[: len(rows) // 8].sort().values.to(rank.device)
    taken = rows[places]
    found["scattered"] = 2 * taken.nbytes / median(_gather, rows, places, taken)
    del rows, taken
    images = torch.ones(_IMAGES, 64, 56, 56, device=rank.device, requires_grad=True)
    weight, slope = (torch.ones(*shape, device=rank.device, requires_grad=True) for shape in ((64, 64, 3, 3), (64,)))
    seconds = median(lambda: torch.conv2d(images, weight, padding=1).sum().backward())
    found["convolutions"] = 3 * 2 * images.numel() * 64 * 9 / seconds
    seconds = median(lambda: torch.prelu(batch_norm(images, None, None, slope, slope, True), slope).sum().backward())
    found["elementwise"] = 3 * 4 * images.nbytes / seconds  # both read and write all, and twice so on the way back
    found |= {"exponential": 0.0, "rounding": 0.0}
    if not gpu:
        block, inverse, total = torch.zeros(_SIDE, BATCH), torch.ones(_SIDE, 1), torch.zeros(BATCH, dtype=torch.float64)
        found["exponential"] = median(_exponentials, block, inverse, total) / block.numel()
        whole, rounded = (
            statistics.median(head_steps(rank, one.config).time(rank, steps=5)[1])
            for dtype in ("float32", "bf16")
            if (one := head_case(_NUMBERS // 8 // dim, dim, 1.0, "device", dtype, "row_adagrad", rank.size))
        )
        found["rounding"] = max(0.0, rounded - whole) * rank.size / (_NUMBERS // 8)
    small = head_case(8 * BATCH, dim, 0.5, "device", "float32", "row_sgd", rank.size)
    found["overhead"] = statistics.median(head_steps(rank, small.config).time(rank, steps=20)[1])
    return found


def _exponentials(block: Tensor, inverse: Tensor, total: Tensor) -> None:
    if native.supports(block):
        native.exponentials(block.zero_(), inverse, 64.0, None, total)
    else:
        block.mul_(inverse).exp_().sum(dim=0)


def _gather(rows: Tensor, places: Tensor, out: Tensor) -> None:
    torch.index_select(rows, 0, places, out=out)
