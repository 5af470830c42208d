"""How fast one card's head is: compared with the card's ceilings, the plain path, the dense head and the peer's."""

import statistics
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from ...partial_fc import PartialFC
from ...partial_fc.objectives import CosFace
from ..ceilings import rank_ceilings
from ..head.case import HeadCase
from ..head.heads import build, with_sgd
from .run import GpuRun, Step


def ceilings(run: GpuRun) -> None:
    """Of products in bfloat16 and of memory, on tensors that no cache holds."""
    seconds, side, numbers = (1.0, 8192, 1 << 30) if run.gpu else (0.01, 64, 1 << 10)
    found = rank_ceilings(run.rank, ["bf16"], seconds, side=side, numbers=numbers)
    run.results["bf16_tflops"] = found["products"]["bf16"] / 1e12
    run.results["bandwidth_tbps"] = found["bandwidth"] / 1e12
    print(f"ceilings: bf16 {run.results['bf16_tflops']:.0f} TFLOP/s, {run.results['bandwidth_tbps']:.2f} TB/s")
    run.free()


def steps(run: GpuRun) -> None:
    """Whole steps of every head at every rate."""
    rates, keep = run.options.rates, run.options.keep_gib
    lines: list[tuple[str, float, Callable[[], AbstractContextManager[Step]]]] = [
        *(("pfc", rate, partial(pfc_step, run, rate, keep)) for rate in rates),
        *(("pfc, p recomputed", rate, partial(pfc_step, run, rate, 0.0)) for rate in rates),
        *(("pfc, plain path", rate, partial(pfc_step, run, rate, keep, fused=False)) for rate in rates),
    ]
    if run.options.peer is not None:
        for name, precision in (("peer", "float32"), ("peer, fp16", "fp16")):
            lines += [(name, rate, partial(_baseline_step, run, "peer", rate, precision)) for rate in rates]
    lines.append(("dense", 1.0, partial(_baseline_step, run, "dense", 1.0, "bf16")))
    for name, rate, make in lines:
        if run.time_is_up:
            print(f"skipped, the time is up: {name} at {rate}")
            continue
        run.free()
        try:
            entry = {"head": name, "rate": rate, **_measured(run, make)}
        except Exception as error:
            run.fail(f"{name} at {rate}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
            continue
        run.results["steps"].append(entry)
        print(f"  {name}, rate {rate}: {entry['ms']:.3f} ms, {entry['peak'] / 2**30:.2f} GiB", flush=True)


def profile(run: GpuRun) -> None:
    """The kernels of three steps by their time on the card."""
    for rate in run.options.rates if run.gpu else []:
        with pfc_step(run, rate, run.options.keep_gib) as step:
            run.times(step, 1)
            with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
                for _ in range(3):
                    step()
                torch.cuda.synchronize()
        averages = recorded.key_averages()
        run.options.out.mkdir(parents=True, exist_ok=True)
        (run.options.out / f"profile-{rate}.txt").write_text(
            averages.table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=60)
        )
        events = [event for event in averages if event.self_device_time_total > 0]
        for event in sorted(events, key=lambda event: -event.self_device_time_total)[:9]:
            milliseconds = event.self_device_time_total / 3e3
            print(f"  rate {rate} {milliseconds:8.3f} ms/step {event.count / 3:5.0f} × {event.key[:70]}")
        del step
        run.free()


def table(run: GpuRun) -> None:
    """A line for each head and rate: time, memory, the three products' share of the ceiling; pfc's ratio to peers."""
    rate_of = run.results.get("bf16_tflops", 0.0)
    by_name = {(entry["head"], entry["rate"]): entry for entry in run.results["steps"]}
    for (name, rate), entry in by_name.items():
        operations = 6 * run.options.batch * run.options.classes * rate * run.options.dim
        entry["share_of_bf16"] = operations / entry["ms"] / 1e9 / rate_of if rate_of else 0.0
        line = f"{name:20} rate {rate:<6} {entry['ms']:9.3f} ms {entry['peak'] / 2**30:6.2f} GiB"
        line += f"  products {entry['share_of_bf16']:.1%} of bf16"
        for peer in ("peer", "peer, fp16"):
            other = by_name.get((peer, rate))
            if other is not None and name.startswith("pfc"):
                memory = entry["peak"] / max(1, other["peak"])
                line += f"  × {peer} {other['ms'] / entry['ms']:.2f}, memory {memory:.2f}"
        print(line)
    run.write()


@contextmanager
def pfc_step(run: GpuRun, rate: float, keep_gib: float, *, fused: bool = True) -> Iterator[Step]:
    """A whole step of pfc's head in bfloat16, to be called inside."""
    options = run.options
    module = PartialFC(
        options.classes, options.dim, objective=CosFace(), sample_rate=rate, device=run.device,
        compute_dtype=torch.bfloat16, keep_bytes=int(keep_gib * 2**30),
    )  # fmt: skip
    head, batches = with_sgd(module), run.batches()

    def step() -> None:
        head.step(*next(batches))
        module.wait_for_update()  # or the update would overlap with what comes next, and not be timed

    with run.path(fused=fused):
        yield step


@contextmanager
def _baseline_step(run: GpuRun, name: str, rate: float, precision: str) -> Iterator[Step]:
    """The same of another head, which cannot do without a process group."""
    options = run.options
    case = HeadCase(name, options.classes, options.dim, options.batch, rate, 1, precision, peer=str(options.peer))
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if run.gpu else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            head, batches = build(case, run.device), run.batches()
            yield lambda: head.step(*next(batches))
        finally:
            dist.destroy_process_group()


def _measured(run: GpuRun, make: Callable[[], AbstractContextManager[Step]]) -> dict[str, Any]:
    """Milliseconds of each step, their median, and the most bytes that were taken meanwhile."""
    before = run.rank.reset_peak()
    with make() as step:
        times = run.times(step, run.options.steps)
    return {"ms": statistics.median(times), "times": times, "peak": run.rank.peak() - before}
