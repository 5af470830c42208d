"""Saves the checkpoints of a run: while training waits, or beside it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from .. import device as devices
from .directory import Best, find_latest, name_of
from .writing import Content, write

_CPU = torch.device("cpu")
_TIMEOUT = timedelta(minutes=30)  # for the slowest rank's part to reach the disk


@dataclass
class _Background:
    """A save beside training: its thread, and what came of it."""

    thread: threading.Thread
    step: int
    problem: str | None = None
    error: BaseException | None = None


class Saver:
    """One rank's part in the saves of a run; every method but ``poll`` and ``close`` is called by all ranks together.

    What the disk refuses (it is full, a quota, a permission) is told in a line and counted, and training goes on with
    the checkpoints that there are. Any other error is raised, of a save beside training at the next call.

    An asynchronous save copies the state into host memory, which stays allocated for the next one, and writes it in a
    thread with a gloo group of its own, so that its messages and those of training cannot meet. (Not
    ``dcp.async_save``: it is declared experimental, and what remains to be done after it, from the fsync to the
    renaming, would have to wait for it in a thread all the same.) There is never more than one: the next waits for it.

    Args:
        run_dir: of the run.
        keep: how many of the latest checkpoints stay.
        best: what makes a checkpoint the best, which stays too; None where none is named.
        device: where this rank computes.
        asynchronous: whether saves are written beside training.
        message: prints a line, on one rank.

    Attributes:
        failed: how many saves came to nothing.
        last_problem: why the last one did, None where it did not.
        last_step: the step of the last save that was begun; -1 before the first.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        best: Best | None,
        asynchronous: bool,
        message: Callable[[str], None],
        device: torch.device = _CPU,
    ) -> None:
        self._run_dir, self._keep, self._best, self._device = run_dir, keep, best, device
        self._asynchronous, self._message = asynchronous, message
        self._group: dist.ProcessGroup | None = None
        if asynchronous:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_TIMEOUT))
        self._buffers: dict[str, Tensor] = {}
        self._background: _Background | None = None
        self._stalled = 0.0
        self.failed = 0
        self.last_problem: str | None = None
        self.last_step = -1

    def save(self, content: Content) -> None:
        """Saves, or begins to; returns when training may go on."""
        begin = time.perf_counter()
        self.wait()
        self.last_step = content.step
        if self._asynchronous:
            self._begin(self._staged(content))
        else:
            self._finished(content.step, self._write(content))
        stalled = time.perf_counter() - begin
        self._stalled += stalled
        if self._asynchronous:
            self._message(
                f"checkpoint {name_of(content.step)} is written beside training, which waited {stalled:.2f} s"
            )
        elif self.last_problem is None:
            self._message(f"checkpoint {name_of(content.step)} saved; training waited {stalled:.2f} s")

    def poll(self) -> None:
        """Tells of a save beside training that has ended."""
        if self._background is not None and not self._background.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the save beside training, if there is one, has ended."""
        background, self._background = self._background, None
        if background is None:
            return
        background.thread.join()
        if background.error is not None:
            raise RuntimeError(f"saving {name_of(background.step)} failed") from background.error
        self._finished(background.step, background.problem)

    def take_stalled(self) -> float:
        """Seconds that training waited for saves since the last call."""
        stalled, self._stalled = self._stalled, 0.0
        return stalled

    def close(self) -> None:
        """Gives the group back; a save that still runs, which after an error may never end, is left alone."""
        if self._background is None and self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _write(self, content: Content) -> str | None:
        return write(self._run_dir, content, keep=self._keep, best=self._best, group=self._group)

    def _begin(self, content: Content) -> None:
        def run() -> None:
            try:
                devices.use(self._device)  # a new thread's is the first GPU, whatever the rank's is
                background.problem = self._write(content)
            except BaseException as error:  # CheckpointException is no Exception; raised in wait()
                background.error = error

        # A daemon: the process of a run that failed must not wait for it.
        thread = threading.Thread(target=run, name=f"save-{content.step}", daemon=True)
        self._background = background = _Background(thread, content.step)
        thread.start()

    def _staged(self, content: Content) -> Content:
        """The content with all tensors copied to the host."""
        staged = replace(
            content,
            tensors={name: self._copied(name, tensor) for name, tensor in content.tensors.items()},
            pieces={name: replace(one, rows=self._copied(name, one.rows)) for name, one in content.pieces.items()},
        )
        devices.synchronize(self._device)
        return staged

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = devices.host_buffer(tensor)
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def _finished(self, step: int, problem: str | None) -> None:
        self.last_problem = problem
        if problem is None:
            return
        self.failed += 1
        good = find_latest(self._run_dir)
        rest = f"the last good one is {good.path.name}" if good is not None else "there is none yet"
        self._message(f"checkpoint {name_of(step)} NOT saved: {problem}; training goes on, {rest}")
