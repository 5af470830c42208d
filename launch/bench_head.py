"""Times whole steps of the head (forward, backward, row update) beside a plain dense head. Needs torch alone.

Each measurement runs in fresh processes, so that its peak memory is its own: the resident set's growth on a CPU, the
allocator's peak on a GPU. The dense head is what one writes first: all logits of the shard, their gradients, and
torch.optim.SGD over the whole matrix; its collectives and its loss are those of the sharded softmax, and exact.
"""

import importlib
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ..partial_fc import PartialFC, RowSGD, objectives
from ..partial_fc.centers import ClassShard


@dataclass(frozen=True)
class HeadCase:
    """One line of the benchmark.

    Attributes:
        head: "pfc", "dense" or "peer".
        classes, dim, batch: C, D and the global batch.
        rate: share of the classes used each step; the dense head always uses all.
        ranks: processes; gloo on a CPU, nccl on GPUs.
        precision: of the products, "float32" or "bf16".
        objective: name of an objective; the dense head has CosFace alone.
    """

    head: str
    classes: int
    dim: int = 512
    batch: int = 128
    rate: float = 1.0
    ranks: int = 2
    precision: str = "float32"
    objective: str = "cosface"
    peer: str = ""
    """Folder that holds ``partial_fc_v2.py`` and ``losses.py`` of the common implementation, for "peer"."""


@dataclass(frozen=True)
class HeadTiming:
    """What was measured: seconds a step on the slowest rank, and peak bytes of the hungriest."""

    case: HeadCase
    median: float
    fastest: float
    slowest: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.case), "median_s": self.median, "min_s": self.fastest, "max_s": self.slowest} | {
            "peak_bytes": self.peak_bytes
        }


def measure(case: HeadCase, *, steps: int = 7, warmup: int = 2, threads: int = 1) -> HeadTiming:
    """Runs one case in processes of its own.

    Args:
        steps: timed steps; warmup: untimed ones before.
        threads: torch's threads per rank, on a CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (case, steps, warmup, threads, folder)
        mp.start_processes(_rank, arguments, nprocs=case.ranks, start_method="spawn")  # pyright: ignore[reportArgumentType]
        results = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(case.ranks)]
    seconds = torch.stack([result["seconds"] for result in results]).amax(dim=0).tolist()
    peak = max(result["peak"] for result in results)
    return HeadTiming(case, statistics.median(seconds), min(seconds), max(seconds), peak)


def _rank(rank: int, case: HeadCase, steps: int, warmup: int, threads: int, folder: str) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(threads)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = _HEADS[case.head](case, device)
    size = case.batch // case.ranks
    generator = torch.Generator().manual_seed(rank)
    seconds = []
    for index in range(warmup + steps):
        embeddings = torch.randn(size, case.dim, generator=generator).to(device).requires_grad_()
        labels = torch.randint(0, case.classes, (size,), generator=generator).to(device)
        dist.barrier()
        _wait(device)
        begin = time.perf_counter()
        step(embeddings, labels)
        _wait(device)
        if index >= warmup:
            seconds.append(time.perf_counter() - begin)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # Linux counts in KiB
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else grown
    torch.save({"seconds": torch.tensor(seconds), "peak": peak}, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _pfc(case: HeadCase, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    head = PartialFC(
        case.classes,
        case.dim,
        objective=objectives.build(case.objective),
        sample_rate=case.rate,
        device=device,
        compute_dtype=torch.bfloat16 if case.precision == "bf16" else torch.float32,
    )
    optimizer = RowSGD(head, lr=0.1, momentum=0.9, weight_decay=5e-4)

    def step(embeddings: Tensor, labels: Tensor) -> None:
        head(embeddings, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _dense(case: HeadCase, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shard = ClassShard.of(case.classes, rank, world_size)
    weight = nn.Parameter(torch.randn(shard.rows, case.dim, device=device) * 0.01)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=5e-4)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    scale, margin = 64.0, 0.35

    def step(embeddings: Tensor, labels: Tensor) -> None:
        batch = _gather(embeddings.detach()).requires_grad_()
        everyone = _gather(labels)
        unit, rows = nn.functional.normalize(batch), nn.functional.normalize(weight)
        cosines = (unit.to(dtype) @ rows.to(dtype).T).float()
        mine = ((everyone >= shard.start) & (everyone < shard.stop)).nonzero()[:, 0]
        columns = everyone[mine] - shard.start
        logits = scale * cosines.index_put((mine, columns), cosines[mine, columns] - margin)
        with torch.no_grad():  # the shift that all ranks agree on
            largest = logits.amax(dim=1)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        exponentials = torch.exp(logits - largest[:, None])
        with torch.no_grad():
            total = exponentials.sum(dim=1)
            dist.all_reduce(total)
        # Its gradient is softmax minus one-hot: that of the cross-entropy over all ranks' classes.
        surrogate = ((exponentials.sum(dim=1) / total).sum() - (logits[mine, columns]).sum()) / len(everyone)
        surrogate.backward()
        assert batch.grad is not None
        gradient = batch.grad
        dist.all_reduce(gradient)
        size = len(embeddings)
        embeddings.grad = gradient[rank * size : (rank + 1) * size] * world_size
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peer(case: HeadCase, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """The common implementation's head, imported from the folder that the user names, with the SGD it is used with."""
    if device.type == "cpu":
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]  # it knows GPUs only
    sys.path.insert(0, case.peer)
    losses, module = importlib.import_module("losses"), importlib.import_module("partial_fc_v2")
    margin = losses.CombinedMarginLoss(64, 1.0, 0.0, 0.35)
    head = module.PartialFC_V2(margin, case.dim, case.classes, case.rate, case.precision == "bf16").to(device).train()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def step(embeddings: Tensor, labels: Tensor) -> None:
        head(embeddings, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _gather(tensor: Tensor) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


_HEADS = {"pfc": _pfc, "dense": _dense, "peer": _peer}
