"""What a run tells about itself, and to whom: the progress line, metrics.jsonl and evaluation.jsonl, and its hooks."""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .hooks import Hook, RunInfo, Values


class Throughput:
    """Speed and share of the time spent waiting for data, between two calls of ``take``.

    It reads the host's clock and nothing else, so it never waits for a device. On a GPU the host runs ahead of the
    device within a window; the window is exact if ``take`` is called right after the loss was read, which waits.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begin = clock()
        self._images = 0
        self._waiting = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside the ``with`` block as time spent waiting for data."""
        begin = self._clock()
        yield
        self._waiting += self._clock() - begin

    def count(self, images: int) -> None:
        """Adds ``images``: of all ranks together, if the speed is to be the run's."""
        self._images += images

    def take(self) -> dict[str, float]:
        """``images_per_second`` and ``data_share`` (0 to 1) of the window that ends here; begins the next one."""
        now = self._clock()
        seconds = max(now - self._begin, 1e-9)
        rates = {"images_per_second": self._images / seconds, "data_share": self._waiting / seconds}
        self._begin, self._images, self._waiting = now, 0, 0.0
        return rates

    def restart(self) -> None:
        """Begins a new window, so that an evaluation or a checkpoint does not count as training time."""
        self.take()


class MetricsLog:
    """A file of JSON lines, one object with a ``step`` per line, on disk as soon as it is written.

    Opened for a resumed run, it drops what the interrupted run wrote after ``resumed_step``, and a torn last line.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        self.last: dict[str, Any] | None = None  # the last object kept
        if path.exists():
            kept = [line for line in read_json_lines(path) if line.get("step", 0) <= resumed_step]
            self.last = kept[-1] if kept else None
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text("".join(_json_line(line) for line in kept), encoding="utf-8")
            os.replace(temporary, path)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Values) -> None:
        """Appends ``{"step": step, **values}``; NaN and infinities become null, which JSON has in their place."""
        self._file.write(_json_line({"step": step, **values}))
        self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # what a full disk did not take, as was told when it was written
            self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, in order; [] if there is none. A line that is not an object is left out:
    a run that was killed may leave its last line torn."""
    objects = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict):
                objects.append(value)
    return objects


class Telemetry:
    """Everything that a run tells: to its files and the progress line, and to the hooks that are given.

    Made by every rank; on all but one it tells nothing, but to hooks that want to hear on every rank.

    Args:
        run_dir: the run's directory; made if missing.
        total_steps: steps of the whole run, for the percentage and the time left.
        world_size: number of ranks, for the speed of one rank.
        is_main: whether this rank tells. True on exactly one.
        rank: this one.
        resumed_step: the last step that was finished before this process began; what the files hold of later steps
            is dropped, because these steps are done again.
        console: where lines go; by default standard output, coloured on a terminal and plain in a file or pipe.
        hooks: what else hears of the run, the same on every rank.
        config: of the run, complete, for the hooks.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        world_size: int,
        is_main: bool,
        rank: int = 0,
        resumed_step: int = 0,
        console: Console | None = None,
        hooks: Sequence[Hook] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.is_main, self._rank = is_main, rank
        self._refused: set[Path] = set()
        self._failed: set[Hook] = set()
        self._console = console or Console(highlight=False)
        run = RunInfo(run_dir, config or {}, total_steps, world_size, rank, resumed_step, self.message, self.tolerating)
        self._hooks: list[Hook] = []
        if is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            files, progress = Files(), Progress(self._print)
            files.start(run)  # without which there is no run
            progress.start(run)
            self._hooks += [files, progress]
            spent = (files.metrics.last or {}).get("elapsed_seconds") or 0.0
            self._begin = time.monotonic() - spent
        heard = (hook for hook in hooks if is_main or hook.every_rank)
        self._hooks += [hook for hook in heard if self._told(hook, hook.start, run)]

    def log(self, step: int, values: Values) -> None:
        """Tells what was measured in step ``step``, with ``elapsed_seconds`` (of training, interruptions left out)."""
        if self.is_main:
            values = {**values, "elapsed_seconds": round(time.monotonic() - self._begin, 3)}
        self._tell("step", step, values)

    def evaluation(self, step: int, values: Values) -> None:
        """Tells of one evaluation, a flat object with ``set`` (the data set's name) and numbers. It prints nothing."""
        self._tell("evaluation", step, values)

    def checkpoint(self, step: int, folder: Path) -> None:
        """Tells of a complete checkpoint."""
        self._tell("checkpoint", step, folder)

    def rollback(self, step: int) -> None:
        """The run goes back to the state after this step."""
        self._tell("rollback", step)

    def message(self, text: str) -> None:
        """Prints one line of text."""
        if self.is_main:
            self._print(Text(text))

    @contextmanager
    def tolerating(self, path: Path) -> Iterator[None]:
        """What the disk refuses to take into ``path`` is told once, and training goes on."""
        try:
            yield
        except OSError as error:
            if path not in self._refused:
                self._refused.add(path)
                self.message(f"warning    {path}: {error.strerror}: it will not be complete; training goes on")

    def close(self, *, finished: bool = False) -> None:
        """The end, of all steps or of this process alone; may be called more than once."""
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            self._told(hook, hook.end, finished)

    def _tell(self, what: str, *arguments: Any) -> None:
        for hook in self._hooks:
            self._told(hook, getattr(hook, what), *arguments)

    def _told(self, hook: Hook, call: Callable[..., None], *arguments: Any) -> bool:
        """Whether the hook took it; what it raises is told once."""
        try:
            call(*arguments)
        except Exception as error:
            if hook not in self._failed:
                self._failed.add(hook)
                reason = " ".join(str(error).split()) or "no reason given"
                text = f"{type(hook).__name__}, in {call.__name__}: {type(error).__name__}: {reason}; training goes on"
                if self.is_main:
                    self.message(f"warning    {text}")
                else:
                    print(f"pfc: rank {self._rank}: {text}", file=sys.stderr, flush=True)
            return False
        return True

    def _print(self, text: Text) -> None:
        with suppress(OSError):  # standard output may be a file on the disk that is full
            self._console.print(text, soft_wrap=True)


class Files(Hook):
    """metrics.jsonl and evaluation.jsonl, on disk as soon as something is told."""

    def start(self, run: RunInfo) -> None:
        self.run = run
        self._open(run.resumed_step)

    def _open(self, resumed_step: int) -> None:
        self.metrics = MetricsLog(self.run.directory / "metrics.jsonl", resumed_step)
        self.evaluations = MetricsLog(self.run.directory / "evaluation.jsonl", resumed_step)

    def step(self, step: int, values: Values) -> None:
        with self.run.tolerating(self.metrics.path):
            self.metrics.write(step, values)

    def evaluation(self, step: int, values: Values) -> None:
        with self.run.tolerating(self.evaluations.path):
            self.evaluations.write(step, values)

    def rollback(self, step: int) -> None:
        with self.run.tolerating(self.run.directory):
            before = self.metrics, self.evaluations
            self._open(step)
            for one in before:
                one.close()

    def end(self, finished: bool) -> None:
        self.metrics.close()
        self.evaluations.close()


class Progress(Hook):
    """The line that shows ``loss``, ``lr``, ``images_per_second`` and ``data_share``, as many as there are.

    Args:
        show: prints a line.
    """

    def __init__(self, show: Callable[[Text], None]) -> None:
        self._show = show
        self._points: deque[tuple[float, int]] = deque(maxlen=20)  # (time, step) of the last lines

    def start(self, run: RunInfo) -> None:
        self.run = run

    def step(self, step: int, values: Values) -> None:
        self._points.append((time.monotonic(), step))
        self._show(progress_line(step, self.run.total_steps, values, self.run.world_size, self._seconds_left(step)))

    def rollback(self, step: int) -> None:
        self._points.clear()

    def _seconds_left(self, step: int) -> float | None:
        (first_time, first_step), (last_time, last_step) = self._points[0], self._points[-1]
        if last_step <= first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * (self.run.total_steps - step)


def progress_line(step: int, total_steps: int, values: Values, world_size: int, seconds_left: float | None) -> Text:
    """``step 1,200/20,000   6%   loss 12.3456   lr 0.0980   812 img/s (406/rank)   data 3%   eta 12:34``"""
    total = f"{total_steps:,}"
    parts = [
        Text.assemble(("step ", "dim"), (f"{step:>{len(total)},}", "bold"), (f"/{total}", "dim")),
        Text(f"{100 * step // max(total_steps, 1):3d}%"),
    ]
    if "loss" in values:
        parts.append(Text.assemble(("loss ", "dim"), (f"{values['loss']:.4f}", "bold cyan")))
    if "lr" in values:
        parts.append(Text.assemble(("lr ", "dim"), _short(values["lr"])))
    if "images_per_second" in values:
        speed = values["images_per_second"]
        per_rank = f" ({speed / world_size:,.0f}/rank)" if world_size > 1 else ""
        parts.append(Text.assemble((f"{speed:,.0f} img/s", "green"), (per_rank, "dim")))
    if "data_share" in values:
        share = values["data_share"]
        parts.append(Text.assemble(("data ", "dim"), (f"{share:.0%}", "yellow" if share > 0.2 else "")))
    if seconds_left is not None:
        parts.append(Text.assemble(("eta ", "dim"), clock_time(seconds_left)))
    return Text("   ").join(parts)


def clock_time(seconds: float) -> str:
    """A duration to read: ``0:07``, ``12:34``, ``3:12:34`` or ``2d 03:12``."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _short(rate: float) -> str:
    return f"{rate:.4f}" if rate >= 0.001 or rate == 0 else f"{rate:.1e}"


def _json_line(values: Values) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
