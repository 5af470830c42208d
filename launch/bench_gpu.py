"""Checks and times the head's GPU path on one card, with torch and Triton alone; pfc need not be installed.

From the root of the repository:

    python launch/bench_gpu.py --out "$OUT" [--peer DIR] [--classes 1000000] [--seconds 480]

In this order, each part skipped when the time is up: the fused kernels against the plain path; steps under torch's
alarm for host synchronisations; the card's ceilings; tiles and block sizes of the fused kernels, of which the best are
taken; whole steps of pfc, of pfc's plain path, of a dense head and, with ``--peer``, of the common implementation's
head; the kernels that a step is made of. A table on the screen, everything in ``gpu.json``. Exit code 1 where a check
failed. ``--device cpu`` runs all of it in small, the kernels interpreted.
"""

import argparse
import gc
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN = time.monotonic()

Step = Callable[[], None]


def main() -> None:
    options = _options()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    package = types.ModuleType("pfc")  # as setup.py would install it
    package.__path__ = [str(ROOT)]
    sys.modules["pfc"] = package
    bench = Bench(options)
    for part in (bench.check, bench.synchronisations, bench.ceilings, bench.sweep, bench.steps, bench.profile):
        if time.monotonic() - BEGIN > options.seconds:
            print(f"skipped, the time is up: {part.__name__}")
            continue
        try:
            part()
        except Exception:
            bench.fail(f"{part.__name__}: {traceback.format_exc()}")
        print(f"-- {part.__name__}: {time.monotonic() - BEGIN:.0f} s so far", flush=True)
        bench.write()
    bench.table()
    sys.exit(1 if bench.results["failures"] else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--keep-gib", type=float, default=4.0, help="for the probabilities between forward and update")
    parser.add_argument("--peer", type=Path, help="folder of the common implementation's partial_fc_v2.py")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=480.0)
    return parser.parse_args()


class Bench:
    """The parts of the measurement, and what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        import triton

        self.options, self.torch = options, torch
        self.gpu = options.device == "cuda"
        self.pfc = importlib.import_module("pfc.partial_fc")
        self.choice: Any = importlib.import_module("pfc.partial_fc.kernels.device")
        self.chosen = self.choice.runs_on if self.gpu else lambda _: True
        self.choice.runs_on = self.chosen
        name = torch.cuda.get_device_name() if self.gpu else "CPU, interpreted"
        self.results: dict[str, Any] = {
            "device": name, "torch": torch.__version__, "triton": triton.__version__,
            "options": {key: str(value) for key, value in vars(options).items()},
            "failures": [], "checks": {}, "steps": [],
        }  # fmt: skip
        print(name, torch.__version__, triton.__version__)

    def fail(self, message: str) -> None:
        self.results["failures"].append(message)
        print("FAILED", message, flush=True)

    def write(self) -> None:
        self.options.out.mkdir(parents=True, exist_ok=True)
        (self.options.out / "gpu.json").write_text(json.dumps(self.results, indent=1))

    # Correctness

    def check(self) -> None:
        """Fused and plain heads from the same centers, three steps: losses, gradients, centers, samples."""
        torch = self.torch
        cases = [
            (1000, 128, 96, 1.0, torch.float32, 1 << 30),
            (9001, 100, 33, 0.2, torch.float32, 0),
            (100_003, 512, 250, 0.1, torch.float32, 1 << 30),
            (300_001, 512, 1024, 1.0, torch.bfloat16, 1 << 30),
            (300_001, 512, 1024, 0.1, torch.bfloat16, 0),
            (4_300_000, 512, 64, 0.01, torch.bfloat16, 1 << 30),  # offsets beyond 2³¹
        ]
        for case in cases if self.gpu else cases[:2]:
            classes, dim, batch, rate, dtype, keep = case
            fused, plain = (self._train(fused, *case) for fused in (True, False))
            for name, value in fused.items():
                distance = (value.double() - plain[name].double()).norm() / plain[name].double().norm()
                # Both round their operands to bfloat16, but not the same ones: rows before or after normalising.
                bound = 1e-4 if dtype == torch.float32 else 3e-2
                text = f"{classes} × {dim}, B {batch}, rate {rate}, {dtype}, keep {keep}: {name}"
                self.results["checks"][text] = float(distance)
                if not float(distance) <= bound:
                    self.fail(f"{text} differs by {float(distance):.2e}, at most {bound:.0e}")
            self._free()
        print(f"largest difference: {max(self.results['checks'].values()):.2e}")
        self._check_samples()

    def _train(self, fused: bool, classes: int, dim: int, batch: int, rate: float, dtype: Any, keep: int) -> dict:
        torch = self.torch
        self.choice.runs_on = self.chosen if fused else lambda _: False
        head = self._head(classes, dim, rate, dtype, keep)
        optimizer = self.pfc.RowSGD(head, lr=0.1, momentum=0.9, weight_decay=5e-4)
        before = head.centers.to_local().clone()
        found = {}
        for step in range(3):
            embeddings, labels = self._batch(step, classes, dim, batch)
            loss = head(embeddings, labels)
            loss.backward()
            found |= {f"loss {step}": loss.detach(), f"embeddings {step}": embeddings.grad}
            optimizer.step()
            optimizer.zero_grad()
        momentum = optimizer.state_dict()["state"]["momentum"].to_local()
        moved = head.centers.to_local() - before
        self.choice.runs_on = self.chosen
        # What few rows show; whole matrices would take long to compare in float64.
        some = torch.arange(0, classes, max(1, classes // 5000), device=moved.device)
        return found | {"centers": moved[some], "momentum": momentum[some], "all centers": moved.norm()}

    def _check_samples(self) -> None:
        torch = self.torch
        sampling = importlib.import_module("pfc.partial_fc.sampling")
        shard = importlib.import_module("pfc.partial_fc.centers").ClassShard
        for classes, ranks in ((1_000_003, 3), (6145, 2)):
            labels = torch.randint(0, classes, (500,), generator=torch.Generator().manual_seed(classes))
            part = shard.of(classes, ranks - 1, ranks)
            for step in range(3):
                settings = {"rate": 0.13, "seed": 7, "step": step}
                there = sampling.sample_classes(labels.to(self.options.device), part, **settings, fixed=True)
                here = sampling.sample_classes(labels, part, **settings)
                if not torch.equal(there.classes.cpu(), here.classes):
                    self.fail(f"the sample of {classes} classes at step {step} is another one than a CPU's")

    def synchronisations(self) -> None:
        """Whole steps with torch's alarm set: a wait of the host for the card raises."""
        torch = self.torch
        small = 200_000 if self.gpu else 500
        for rate, batch_rate in ((1.0, 1.0), (0.1, 1.0), (0.1, 0.5)):
            head = self._head(small, 256, rate, torch.bfloat16, 1 << 30)
            head.batch_rate = batch_rate
            optimizer = self.pfc.RowSGD(head, lr=0.1, momentum=0.9, weight_decay=5e-4)
            batches = [self._batch(step, small, 256, 128 if self.gpu else 8) for step in range(5)]
            for step, (embeddings, labels) in enumerate(batches):
                if step == 2 and self.gpu:
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    head(embeddings, labels).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                except RuntimeError:
                    self.fail(f"a host synchronisation at rate {rate}, {batch_rate}: {traceback.format_exc()}")
                    break
                finally:
                    if step == len(batches) - 1 and self.gpu:
                        torch.cuda.set_sync_debug_mode("default")
            if self.gpu:
                torch.cuda.set_sync_debug_mode("default")
        print("steps under the alarm for host synchronisations: done")
        self._free()

    # Speed

    def ceilings(self) -> None:
        torch, size = self.torch, 8192 if self.gpu else 64
        left, right = (torch.randn(size, size, device=self.options.device).bfloat16() for _ in range(2))
        source = torch.randn(1 << (30 if self.gpu else 10), device=self.options.device)
        target = torch.empty_like(source)
        product = statistics.median(self._times(lambda: left @ right, 10))
        copy = statistics.median(self._times(lambda: target.copy_(source), 10))
        self.results["bf16_tflops"] = 2 * size**3 / product / 1e9
        self.results["bandwidth_tbps"] = 2 * source.nbytes / copy / 1e9
        print(f"ceilings: bf16 {self.results['bf16_tflops']:.0f} TFLOP/s, {self.results['bandwidth_tbps']:.2f} TB/s")
        self._free()

    def sweep(self) -> None:
        """Tiles of the product with exponentials, then block sizes of a whole step; the best stay."""
        torch = self.torch
        module = importlib.import_module("pfc.partial_fc.kernels.fused_powers")
        rows, batch, dim = (32768, self.options.batch, self.options.dim) if self.gpu else (256, 8, 32)
        unit, block = (
            torch.nn.functional.normalize(torch.randn(size, dim, device=self.options.device)).bfloat16()
            for size in (batch, rows)
        )
        columns = torch.full((batch,), -1, device=self.options.device)
        power = block.new_empty(rows, batch)
        sums = torch.zeros(rows // 64, batch, device=self.options.device)
        found: dict[str, float] = {}
        shapes = [(128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (128, 128, 32, 8, 4)]
        shapes += [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (64, 256, 64, 4, 3)]
        for shape in shapes if self.gpu else shapes[:2]:
            tiles = module.Tiles(*shape)
            module.TILES[torch.bfloat16] = tiles

            run = partial(
                module.powers, block, unit, columns, None, power, sums, first=0, count=rows, scale=64.0, ceiling=None
            )
            try:
                found[str(shape)] = statistics.median(self._times(run, 20 if self.gpu else 1))
            except Exception as error:  # out of shared memory, on a smaller card
                print(f"  {shape}: {type(error).__name__}")
                continue
            rate = 2 * rows * batch * dim / found[str(shape)] / 1e9
            print(f"  tiles {shape}: {found[str(shape)]:.3f} ms, {rate:.0f} TFLOP/s")
        best = min(found, key=lambda key: found[key])
        module.TILES[torch.bfloat16] = module.Tiles(*json.loads(best.replace("(", "[").replace(")", "]")))
        del power, sums, block, run
        self._free()
        sizes: dict[str, float] = {}
        fused: Any = importlib.import_module("pfc.partial_fc.kernels.fused")
        update: Any = importlib.import_module("pfc.partial_fc.kernels.fused_update")
        step = self._pfc(1.0, self.options.keep_gib)
        for target, exponents in (((fused, "sums"), (23, 24, 25, 26, 27)), ((update, "update"), (21, 22, 23, 24))):
            taken: dict[int, float] = {}
            for exponent in exponents if self.gpu else exponents[:1]:
                target[0].BLOCK_NUMBERS = 1 << exponent
                taken[exponent] = statistics.median(self._times(step, 8))
                sizes[f"{target[1]} 2^{exponent}"] = taken[exponent]
                print(f"  blocks of the {target[1]} 2^{exponent}: {taken[exponent]:.2f} ms/step")
            target[0].BLOCK_NUMBERS = 1 << min(taken, key=lambda key: taken[key])
        self.results["sweep"] = {"tiles": found, "best": best, "blocks": sizes}
        del step
        self._free()

    def steps(self) -> None:
        keep = self.options.keep_gib
        heads: list[tuple[str, Callable[[float], Step]]] = [
            ("pfc", lambda rate: self._pfc(rate, keep)),
            ("pfc, p made again", lambda rate: self._pfc(rate, 0.0)),
            ("pfc, plain path", lambda rate: self._pfc(rate, keep, fused=False)),
        ]
        if self.options.peer is not None:
            heads += [
                ("peer", lambda rate: self._peer(rate, False)),
                ("peer, fp16", lambda rate: self._peer(rate, True)),
            ]
        heads += [("dense", self._dense)]
        torch = self.torch
        for name, make in heads:
            for rate in self.options.rates if name != "dense" else [1.0]:
                if time.monotonic() - BEGIN > self.options.seconds:
                    print(f"skipped, the time is up: {name} at {rate}")
                    continue
                self._free()
                if self.gpu:
                    torch.cuda.reset_peak_memory_stats()
                try:
                    step = make(rate)
                    times = self._times(step, self.options.steps)
                except Exception as error:
                    self.fail(f"{name} at {rate}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
                    continue
                finally:
                    self.choice.runs_on = self.chosen
                peak = torch.cuda.max_memory_allocated() if self.gpu else 0
                entry = {"head": name, "rate": rate, "ms": statistics.median(times), "times": times, "peak": peak}
                self.results["steps"].append(entry)
                print(f"  {name}, rate {rate}: {entry['ms']:.3f} ms, {peak / 2**30:.2f} GiB", flush=True)
                del step

    def profile(self) -> None:
        """The kernels of three steps by their time on the card."""
        from torch.profiler import ProfilerActivity, profile

        for rate in self.options.rates if self.gpu else []:
            step = self._pfc(rate, self.options.keep_gib)
            self._times(step, 1)
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
                for _ in range(3):
                    step()
                self.torch.cuda.synchronize()
            table = recorded.key_averages().table(
                sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=60
            )
            self.options.out.mkdir(parents=True, exist_ok=True)
            (self.options.out / f"profile-{rate}.txt").write_text(table)
            events = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
            for event in sorted(events, key=lambda event: -event.self_device_time_total)[:9]:
                milliseconds = event.self_device_time_total / 3e3
                print(f"  rate {rate} {milliseconds:8.3f} ms/step {event.count / 3:5.0f} × {event.key[:70]}")
            del step
            self._free()

    def table(self) -> None:
        rate_of = self.results.get("bf16_tflops", 0.0)
        by_name = {(entry["head"], entry["rate"]): entry for entry in self.results["steps"]}
        for (name, rate), entry in by_name.items():
            operations = 6 * self.options.batch * self.options.classes * rate * self.options.dim
            entry["share_of_bf16"] = operations / entry["ms"] / 1e9 / rate_of if rate_of else 0.0
            line = f"{name:20} rate {rate:<6} {entry['ms']:9.3f} ms {entry['peak'] / 2**30:6.2f} GiB"
            line += f"  products {entry['share_of_bf16']:.1%} of bf16"
            for peer in ("peer", "peer, fp16"):
                other = by_name.get((peer, rate))
                if other is not None and name.startswith("pfc"):
                    memory = entry["peak"] / max(1, other["peak"])
                    line += f"  × {peer} {other['ms'] / entry['ms']:.2f}, memory {memory:.2f}"
            print(line)
        self.write()

    # Heads

    def _pfc(self, rate: float, keep_gib: float, *, fused: bool = True) -> Step:
        self.choice.runs_on = self.chosen if fused else lambda _: False
        options = self.options
        head = self._head(options.classes, options.dim, rate, self.torch.bfloat16, int(keep_gib * 2**30))
        optimizer = self.pfc.RowSGD(head, lr=0.1, momentum=0.9, weight_decay=5e-4)
        batches = self._batches()

        def step() -> None:
            head(*next(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
            head.wait_for_update()  # or the update would run beside what comes next, and not be timed

        return step

    def _dense(self, rate: float) -> Step:
        torch, options = self.torch, self.options
        functional = torch.nn.functional
        weight = torch.nn.Parameter(torch.randn(options.classes, options.dim, device=options.device) * 0.01)
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=5e-4)
        batches = self._batches()

        def step() -> None:
            embeddings, labels = next(batches)
            rows, unit = functional.normalize(weight), functional.normalize(embeddings)
            logits = (unit.bfloat16() @ rows.bfloat16().T).float() * 64.0
            margin = torch.full(labels.shape, -64.0 * 0.35, device=labels.device)[:, None]
            functional.cross_entropy(logits.scatter_add(1, labels[:, None], margin), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _peer(self, rate: float, half: bool) -> Step:
        """The common implementation's head from the folder that ``--peer`` names, with the SGD it is used with."""
        torch, options = self.torch, self.options
        if not torch.distributed.is_initialized():
            store = f"file://{tempfile.mkdtemp()}/store"
            backend = "nccl" if self.gpu else "gloo"
            torch.distributed.init_process_group(backend, init_method=store, rank=0, world_size=1)
        if not self.gpu:
            torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
        if str(options.peer) not in sys.path:
            sys.path.insert(0, str(options.peer))
        losses, module = importlib.import_module("losses"), importlib.import_module("partial_fc_v2")
        margin = losses.CombinedMarginLoss(64, 1.0, 0.0, 0.35)
        head = module.PartialFC_V2(margin, options.dim, options.classes, rate, half).to(options.device).train()
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        batches = self._batches()

        def step() -> None:
            head(*next(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _head(self, classes: int, dim: int, rate: float, dtype: Any, keep: int) -> Any:
        head = self.pfc.PartialFC(
            classes, dim, objective=self.pfc.objectives.CosFace(), sample_rate=rate, device=self.options.device,
            compute_dtype=dtype, keep_bytes=keep,
        )  # fmt: skip
        return head

    def _batches(self) -> Any:
        """Endlessly a few batches, made before: their making is no part of a step."""
        options = self.options
        made = [self._batch(step, options.classes, options.dim, options.batch) for step in range(4)]
        while True:
            for embeddings, labels in made:
                embeddings.grad = None
                yield embeddings, labels

    def _batch(self, step: int, classes: int, dim: int, batch: int) -> Any:
        torch = self.torch
        generator = torch.Generator().manual_seed(step)
        embeddings = torch.randn(batch, dim, generator=generator).to(self.options.device).requires_grad_()
        labels = torch.randint(0, classes, (batch,), generator=generator)
        labels[1] = labels[0]
        return embeddings, labels.to(self.options.device)

    def _times(self, function: Step, count: int) -> list[float]:
        """Milliseconds of each of ``count`` calls after three untimed ones."""
        torch = self.torch
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

    def _free(self) -> None:
        gc.collect()
        if self.gpu:
            self.torch.cuda.synchronize()
            self.torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
