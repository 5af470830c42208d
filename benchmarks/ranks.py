"""Runs a function on fresh processes joined in a process group, and says in one line why it could not."""

import os
import re
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ..engine import device as devices

_GRACE = 5.0
"""Seconds that the other ranks have after one has died."""


class RankDied(Exception):
    """A rank ended before it was done; the message is one line. ``wrong_use`` where its exception was a UsageError."""

    def __init__(self, message: str, wrong_use: bool = False) -> None:
        super().__init__(message)
        self.wrong_use = wrong_use


@dataclass(frozen=True)
class Rank:
    """This process among those of a measurement; one alone needs no process group."""

    number: int
    size: int
    device: torch.device

    def synchronize(self) -> None:
        """Until the device has done what it was asked."""
        devices.synchronize(self.device)

    def wait(self) -> None:
        """Until all ranks are here and their devices idle."""
        self.synchronize()
        if self.size > 1:
            dist.barrier()
            self.synchronize()

    def time_steps(
        self, step: Callable[..., object], steps: int, warmup: int, prepare: Callable[[], tuple[Any, ...]] = tuple
    ) -> list[float]:
        """Seconds of each of ``steps`` calls of ``step(*prepare())``, after ``warmup`` untimed ones.

        All ranks begin each of them together; ``prepare`` is not timed.
        """
        seconds = []
        for _ in range(warmup + steps):
            arguments = prepare()
            self.wait()
            begin = time.perf_counter()
            step(*arguments)
            self.synchronize()
            seconds.append(time.perf_counter() - begin)
        return seconds[warmup:]

    def reset_peak(self) -> int:
        """Forgets the peak memory so far; returns the bytes that are taken now."""
        if self.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self.device)
            return torch.accelerator.memory_allocated(self.device)
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")

    def peak(self) -> int:
        """Most bytes taken since: by the allocator on a GPU, resident in memory on a CPU."""
        if self.device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self.device)
        return _resident("VmHWM")


class OwnMemory:
    """The most that this process takes while it is in here, beyond what it took, without pages of mapped files.

    Those are the system's, which takes them back as it likes; the peak that it remembers counts them. So this one is
    looked at now and then.
    """

    def __enter__(self) -> "OwnMemory":
        self._before = self._most = _resident("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def peak(self) -> int:
        return self._most - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._most = max(self._most, _resident("RssAnon"))


def run(function: Callable[..., Any], ranks: int, threads: int, *arguments: Any, world_size: int = 0) -> list[Any]:
    """What ``function(rank, *arguments)`` returned on each of ``ranks`` new processes.

    gloo where there is no GPU, nccl where there is. The function must be importable, its results be such as torch.save
    takes and torch.load gives back as weights only: numbers, strings, lists, dicts and tensors.

    Args:
        threads: torch's threads per process, on a CPU.
        world_size: simulated; of so many ranks the one process is the first, and what it exchanges with the others goes
            nowhere. The processes are all ranks that there are when 0.

    Raises:
        RankDied: an exception or a signal ended one of them. The others are ended too.
    """
    with tempfile.TemporaryDirectory(prefix="pfc-bench-") as folder:
        processes = _start(ranks, world_size, threads, folder, function, arguments)
        try:
            _join(processes)
            exit_codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        if any(exit_codes) or None in exit_codes:
            raise _cause(Path(folder), exit_codes)
        return [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]


def _start(ranks: int, *given: Any) -> list[SpawnProcess]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library writes to the screen; read when it loads
    context = mp.get_context("spawn")
    processes = [context.Process(target=_serve, args=(rank, ranks, *given), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def _join(processes: list[SpawnProcess]) -> None:
    """Until all have ended well; or one has not, and the others have had the time to say what they saw."""
    running: dict[Any, SpawnProcess] = {process.sentinel: process for process in processes}
    deadline = None
    while running and (deadline is None or time.monotonic() < deadline):
        for sentinel in wait(list(running), timeout=None if deadline is None else deadline - time.monotonic()):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode and deadline is None:
                deadline = time.monotonic() + _GRACE


def _serve(
    number: int, size: int, simulated: int, threads: int, folder: str, function: Callable[..., Any], arguments: tuple
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its ranks
    # What torch and the peer warn about is for those who maintain them; a measurement has one line to give.
    warnings.simplefilter("ignore")
    try:
        device = devices.local_device(number)
        devices.use(device)
        if device.type == "cpu":
            torch.set_num_threads(threads)
        if simulated:
            simulate_world(simulated)
        else:
            dist.init_process_group(
                devices.backend(device), init_method=f"file://{folder}/store", rank=number, world_size=size
            )
        torch.save(function(Rank(number, size, device), *arguments), os.path.join(folder, f"{number}.pt"))
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        details = {"type": type(error).__name__, "message": lines[0], "time": time.time()}
        torch.save(details, os.path.join(folder, f"error-{number}.pt"))
        os._exit(1)  # the parent reports it in one line


def simulate_world(size: int) -> None:
    """Makes this process the first of ``size`` ranks; the others do not exist, and its collectives return at once.

    What they leave in their results is nothing to compute with: this rank's own numbers, or whatever was there.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # on import it registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)


def _cause(folder: Path, exit_codes: Sequence[int | None]) -> RankDied:
    """A rank killed by a signal is the cause, whatever the others say; else the first exception is."""
    for code in exit_codes:
        if code is not None and code < 0:
            memory = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
            return RankDied(f"a rank was killed by {signal.Signals(-code).name}{memory}")
    errors = sorted(
        (torch.load(path, weights_only=True) for path in folder.glob("error-*.pt")), key=lambda details: details["time"]
    )
    if not errors:
        return RankDied(f"a rank ended with exit code {next(code for code in exit_codes if code)}")
    kind, message = errors[0]["type"], errors[0]["message"]
    return RankDied(message if kind == "UsageError" else f"{kind}: {message}", wrong_use=kind == "UsageError")


def _resident(field: str) -> int:
    """Bytes of this process, now (VmRSS; RssAnon without files' pages) or at most (VmHWM)."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
