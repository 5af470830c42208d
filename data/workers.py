"""Work spread over processes: results in order, few in flight; a worker that dies is an error, not a hang."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Called as progress(done, total) now and then, and at the end with done == total."""


def default_workers() -> int:
    """As many as the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int | None = None, chunk: int = 64
) -> Iterator[Result]:
    """``map(function, tasks)``, computed by ``workers`` processes (None: one a core; 1: in this process).

    Results come in the order of the tasks. At most 3 × workers chunks of ``chunk`` tasks are in flight, so
    memory stays bounded however long ``tasks`` is. ``function`` must be picklable (a function of a module, or
    a functools.partial of one). What it raises is raised here; RuntimeError where a worker process died.
    """
    workers = default_workers() if workers is None else workers
    if workers <= 1:
        yield from map(function, tasks)
        return
    rest = iter(tasks)
    # Spawned, not forked: a forked child inherits the locks of threads that it does not have.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start)
    flying: deque[Future[list[Result]]] = deque()
    try:
        while True:
            while len(flying) < 3 * workers and (tasks_now := list(islice(rest, chunk))):
                flying.append(pool.submit(_run, function, tasks_now))
            if not flying:
                return
            yield from flying.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError("a worker process died (killed, or out of memory): use fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    """Of a worker process: it ends with the process that started it, and by nothing else."""
    # Ctrl-C reaches that process, which ends the workers; they would only add tracebacks of their own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Killed, it cannot end them, and they would wait for tasks for ever: each holds both ends of the queue.
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(function: Callable[[Task], Result], tasks: list[Task]) -> list[Result]:
    return [function(task) for task in tasks]
