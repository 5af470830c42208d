"""Some steps of a run, measured operation by operation: torch.profiler's trace and a page that sums it up."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..ranks.distributed import World

FOLDER, TRACE, SUMMARY = "profile", "trace.json", "summary.txt"
_PREFIX = "pfc: "
_ROWS = 30


class StepProfile:
    """``log.profile``: from the first step to the last, on the first rank, into the run's folder ``profile``.

    Args:
        steps: first and last, counted from 1; None for none.
        run_dir: of the run.
        world: this rank's place. What its heartbeat says becomes a range of the trace.
    """

    def __init__(self, steps: list[int] | None, run_dir: Path, world: World) -> None:
        self._steps = range(steps[0], steps[1] + 1) if steps is not None and world.is_main else range(0)
        self._folder, self._world = run_dir / FOLDER, world
        self._profiler: profile | None = None
        self._phase: Any = None
        self._done: list[int] = []

    def begin(self, step: int) -> None:
        """Before the step of this number, from 1."""
        if self._profiler is None and step in self._steps:
            activities = [ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities, profile_memory=True, acc_events=True)
            self._done = []
            self._profiler.start()
            self._world.heartbeat.listener = self._enter

    def end(self, step: int) -> None:
        """After it, with what is logged, evaluated and saved then."""
        if self._profiler is not None:
            self._done.append(step)
            if step + 1 not in self._steps:
                self.close()

    def close(self) -> None:
        """Writes what was measured; the run may end before the last step."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        self._world.heartbeat.listener = None
        self._leave()
        profiler.stop()
        if not self._done:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / TRACE))
        (self._folder / SUMMARY).write_text(self._summary(profiler), encoding="utf-8")

    def _enter(self, phase: str) -> None:
        self._leave()
        self._phase = record_function(_PREFIX + phase)
        self._phase.__enter__()

    def _leave(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None

    def _summary(self, profiler: profile) -> str:
        phases: dict[str, float] = defaultdict(float)
        for event in profiler.events() or ():
            if event.name.startswith(_PREFIX) and event.device_type == torch.autograd.DeviceType.CPU:
                phases[event.name.removeprefix(_PREFIX)] += event.time_range.elapsed_us() / 1000
        steps, total = len(self._done), sum(phases.values())
        lines = [
            f"steps {self._done[0]:,} to {self._done[-1]:,}: {total / steps:.1f} ms a step, on rank 0 of "
            f"{self._world.size} ({self._world.device.type}); measuring makes them slower",
            "",
            f"{'phase':<40} {'ms a step':>10} {'share':>7}",
            *(
                f"{name:<40} {time / steps:>10.2f} {time / total:>7.1%}"
                for name, time in sorted(phases.items(), key=lambda item: -item[1])
            ),
            "",
            f"operations, all {steps} steps together; the whole trace, for https://ui.perfetto.dev: {TRACE}",
            "",
        ]
        order = "self_cuda_time_total" if self._world.device.type == "cuda" else "self_cpu_time_total"
        averages = profiler.key_averages()
        kept = type(averages)([one for one in averages if not one.key.startswith(_PREFIX)], profile_memory=True)
        return "\n".join(lines) + kept.table(sort_by=order, row_limit=_ROWS, max_name_column_width=60)
