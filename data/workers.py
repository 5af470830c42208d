"""Work spread over processes: results in order, few in flight; a worker that dies is an error, not a hang."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import current_process, get_context, parent_process
from multiprocessing.synchronize import Event
from threading import Thread
from typing import Any, TypeVar

from .errors import UsageError

IN_FLIGHT = 1 << 28  # bytes of results that wait for their turn, about, all workers together

Task = TypeVar("Task")
Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Called as progress(done, total) now and then, and at the end with done == total."""


def default_workers() -> int:
    """As many as the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_unguarded_worker() -> None:
    """End this process where it is a worker that just starts: it imports the script that started it, and the script,
    without a guard, does what the worker is there for. ``parallel_map`` reports it, once for all workers.

    Called before anything is done that several processes must not do.
    """
    if getattr(current_process(), "_inheriting", False):  # as multiprocessing itself finds it out
        os._exit(1)


class WorkerDied(RuntimeError):
    """A worker process was ended from outside."""


def parallel_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int | None = None, chunk: int = 64
) -> Iterator[Result]:
    """``map(function, tasks)``, computed by ``workers`` processes (None: one a core; 1: in this process).

    Results come in the order of the tasks. At most 3 × workers chunks of ``chunk`` tasks are in flight, and fewer where
    results (bytes, or tuples with them) are so large that they would take more than ``IN_FLIGHT``: memory stays bounded
    however long ``tasks`` is. ``function`` must be picklable (a function of a module, or a functools.partial of one).
    What it raises is raised here; WorkerDied where a worker process did, UsageError if none could start.
    """
    workers = default_workers() if workers is None else workers
    if workers <= 1:
        yield from map(function, tasks)
        return
    end_unguarded_worker()
    rest = iter(tasks)
    # Spawned, not forked: a forked child inherits the locks of threads that it does not have.
    context = get_context("spawn")
    begun = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(begun,))
    flying: deque[tuple[Future[list[Result]], list[Task]]] = deque()
    most, limit, size = 3 * workers, IN_FLIGHT // (3 * workers), 1
    try:
        while True:
            while len(flying) < most and (tasks_now := list(islice(rest, size))):
                flying.append((pool.submit(_run, function, tasks_now, limit), tasks_now))
            if not flying:
                return
            future, given = flying.popleft()
            results = future.result()
            if left := given[len(results) :]:
                flying.appendleft((pool.submit(_run, function, left, limit), left))
            mean = 1 + sum(map(_bytes, results)) // len(results)
            size = min(chunk, max(1, limit // (2 * mean)))  # half, so that chunks are seldom cut short
            most = min(3 * workers, max(1, IN_FLIGHT // (size * mean)))
            yield from results
            del results, future
    except BrokenProcessPool:
        if not begun.is_set():
            raise UsageError(
                'the worker processes ended before they began: write `if __name__ == "__main__":` above what your '
                "script does, since each of them imports it; or ask for workers=1"
            ) from None
        raise WorkerDied("a worker process died (killed, or out of memory): use fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(begun: Event) -> None:
    """Of a worker process: it ends with the process that started it, and by nothing else."""
    begun.set()
    # Ctrl-C reaches that process, which ends the workers; they would only add tracebacks of their own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Killed, it cannot end them, and they would wait for tasks for ever: each holds both ends of the queue.
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(function: Callable[[Task], Result], tasks: list[Task], limit: int) -> list[Result]:
    """The results of the first of ``tasks``, until they have ``limit`` bytes."""
    results: list[Result] = []
    total = 0
    for task in tasks:
        results.append(function(task))
        total += _bytes(results[-1])
        if total >= limit:
            break
    return results


def _bytes(result: Any) -> int:
    """About how much memory a result takes, if much."""
    if isinstance(result, tuple):
        return sum(map(_bytes, result))
    return len(result) if isinstance(result, bytes) else 0
