"""Whether the head's GPU path is right: the fused kernels, the class sample, and no step that waits for the card."""

import traceback

import torch
from torch import Tensor

from ...partial_fc.centers import ClassShard
from ...partial_fc.sampling import sample_classes
from .gpu_run import GpuRun
from .heads import with_sgd

_CASES = (  # classes, dimension, batch, rate, dtype of the products, bytes to keep the probabilities in
    (1000, 128, 96, 1.0, torch.float32, 1 << 30),
    (9001, 100, 33, 0.2, torch.float32, 0),
    (100_003, 512, 250, 0.1, torch.float32, 1 << 30),
    (300_001, 512, 1024, 1.0, torch.bfloat16, 1 << 30),
    (300_001, 512, 1024, 0.1, torch.bfloat16, 0),
    (4_300_000, 512, 64, 0.01, torch.bfloat16, 1 << 30),  # offsets beyond 2³¹
)


def check(run: GpuRun) -> None:
    """Fused and plain heads from the same centers, three steps: losses, gradients, centers, samples."""
    checks = run.results["checks"]
    for case in _CASES if run.gpu else _CASES[:2]:
        classes, dim, batch, rate, dtype, keep = case
        fused, plain = (_train(run, fused, *case) for fused in (True, False))
        # Both round their operands to bfloat16, but not the same ones: rows before or after normalising.
        bound = 1e-4 if dtype == torch.float32 else 3e-2
        for name, value in fused.items():
            distance = float((value.double() - plain[name].double()).norm() / plain[name].double().norm())
            text = f"{classes} × {dim}, B {batch}, rate {rate}, {dtype}, keep {keep}: {name}"
            checks[text] = distance
            if not distance <= bound:
                run.fail(f"{text} differs by {distance:.2e}, at most {bound:.0e}")
        run.free()
    print(f"largest difference: {max(checks.values()):.2e}")
    _check_samples(run)


def _train(
    run: GpuRun, fused: bool, classes: int, dim: int, batch: int, rate: float, dtype: torch.dtype, keep: int
) -> dict[str, Tensor]:
    head = run.head(classes, dim, rate, dtype, keep)
    optimizer = with_sgd(head).optimizer
    before = head.centers.to_local().clone()
    found = {}
    with run.path(fused=fused):
        for step in range(3):
            embeddings, labels = run.batch(step, classes, dim, batch)
            loss = head(embeddings, labels)
            loss.backward()
            found |= {f"loss {step}": loss.detach(), f"embeddings {step}": embeddings.grad}
            optimizer.step()
            optimizer.zero_grad()
        momentum = optimizer.state_dict()["state"]["momentum"].to_local()
        moved = head.centers.to_local() - before
    # What few rows show; whole matrices would take long to compare in float64.
    some = torch.arange(0, classes, max(1, classes // 5000), device=moved.device)
    return found | {"centers": moved[some], "momentum": momentum[some], "all centers": moved.norm()}


def _check_samples(run: GpuRun) -> None:
    for classes, ranks in ((1_000_003, 3), (6145, 2)):
        labels = torch.randint(0, classes, (500,), generator=torch.Generator().manual_seed(classes))
        shard = ClassShard.of(classes, ranks - 1, ranks)
        for step in range(3):
            there = sample_classes(labels.to(run.device), shard, rate=0.13, seed=7, step=step, fixed=True)
            here = sample_classes(labels, shard, rate=0.13, seed=7, step=step)
            if not torch.equal(there.classes.cpu(), here.classes):
                run.fail(f"the sample of {classes} classes at step {step} is another one than a CPU's")


def synchronisations(run: GpuRun) -> None:
    """Whole steps with torch's alarm set: a wait of the host for the card raises."""
    classes, dim, batch = (200_000, 256, 128) if run.gpu else (500, 256, 8)
    for rate, batch_rate in ((1.0, 1.0), (0.1, 1.0), (0.1, 0.5)):
        module = run.head(classes, dim, rate, torch.bfloat16, 1 << 30)
        module.batch_rate = batch_rate
        head = with_sgd(module)
        batches = [run.batch(step, classes, dim, batch) for step in range(5)]
        try:
            with run.path(fused=True):
                for step, (embeddings, labels) in enumerate(batches):
                    if step == 2 and run.gpu:  # the first ones compile, and allocate
                        torch.cuda.synchronize()
                        torch.cuda.set_sync_debug_mode("error")
                    head.step(embeddings, labels)
        except RuntimeError:
            run.fail(f"a host synchronisation at rate {rate}, {batch_rate}: {traceback.format_exc()}")
        finally:
            if run.gpu:
                torch.cuda.set_sync_debug_mode("default")
    print("steps under the alarm for host synchronisations: done")
    run.free()
