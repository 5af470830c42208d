"""What a run tells about itself: the progress line, metrics.jsonl, evaluation.jsonl and TensorBoard."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

Values = Mapping[str, Any]  # numbers (float, int, bool) and strings; numbers go to TensorBoard too


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
    """Everything that a run tells, told by one rank; on the others every method does nothing.

    Args:
        run_dir: the run's directory; made if missing.
        total_steps: steps of the whole run, for the percentage and the time left.
        world_size: number of ranks, for the speed of one rank.
        is_main: whether this rank tells. True on exactly one.
        resumed_step: the last step that was finished before this process began; what the files hold of later steps
            is dropped, because these steps are done again.
        console: where lines go; by default standard output, coloured on a terminal and plain in a file or pipe.
        tensorboard: whether to write ``run_dir/tensorboard``.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        world_size: int,
        is_main: bool,
        resumed_step: int = 0,
        console: Console | None = None,
        tensorboard: bool = True,
    ) -> None:
        self.is_main = is_main
        self._run_dir = run_dir
        self._refused: set[Path] = set()
        if not is_main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._total_steps = total_steps
        self._world_size = world_size
        self._console = console or Console(highlight=False)
        self._metrics = MetricsLog(run_dir / "metrics.jsonl", resumed_step)
        self._evaluation = MetricsLog(run_dir / "evaluation.jsonl", resumed_step)
        self._board = _open_tensorboard(run_dir / "tensorboard", resumed_step, self.message) if tensorboard else None
        spent = (self._metrics.last or {}).get("elapsed_seconds") or 0.0
        self._begin = time.monotonic() - spent
        self._points: deque[tuple[float, int]] = deque(maxlen=20)  # (time, step) of the last logged steps

    def log(self, step: int, values: Values, *, line: bool = True) -> None:
        """Records what was measured in step ``step``.

        ``values`` goes to metrics.jsonl, with ``elapsed_seconds`` (of training, interruptions left out) added, and its
        numbers to TensorBoard. The progress line shows ``loss``, ``lr``, ``images_per_second`` and ``data_share``, as
        many of them as there are; ``line=False`` leaves it out.
        """
        if not self.is_main:
            return
        now = time.monotonic()
        with self.tolerating(self._metrics.path):
            self._metrics.write(step, {**values, "elapsed_seconds": round(now - self._begin, 3)})
        self._to_tensorboard(step, values, "train/")
        self._points.append((now, step))
        if line:
            self._print(progress_line(step, self._total_steps, values, self._world_size, self._seconds_left(step)))

    def evaluation(self, step: int, values: Values) -> None:
        """Records one evaluation, a flat object with ``set`` (the data set's name) and numbers, in evaluation.jsonl
        and TensorBoard. It prints nothing."""
        if not self.is_main:
            return
        with self.tolerating(self._evaluation.path):
            self._evaluation.write(step, values)
        self._to_tensorboard(step, values, f"evaluation/{values.get('set', '')}/")

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

    def close(self) -> None:
        """Closes the files; may be called more than once."""
        if not self.is_main:
            return
        self._metrics.close()
        self._evaluation.close()
        if self._board is not None:
            with self.tolerating(self._run_dir / "tensorboard"):
                self._board.close()

    def _seconds_left(self, step: int) -> float | None:
        (first_time, first_step), (last_time, last_step) = self._points[0], self._points[-1]
        if last_step <= first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * (self._total_steps - step)

    def _to_tensorboard(self, step: int, values: Values, prefix: str) -> None:
        if self._board is None:
            return
        with self.tolerating(self._run_dir / "tensorboard"):
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(prefix + key, value, step)

    def _print(self, text: Text) -> None:
        with suppress(OSError):  # standard output may be a file on the disk that is full
            self._console.print(text, soft_wrap=True)


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


def _open_tensorboard(directory: Path, resumed_step: int, message: Callable[[str], None]) -> Any | None:
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one rank needs it
    except ImportError:
        message("TensorBoard is not installed, so no tensorboard/ is written (pip install tensorboard)")
        return None
    return SummaryWriter(str(directory), purge_step=resumed_step + 1 if resumed_step else None)
