"""Real gloo ranks for tests: a pool of processes per world size, started once and used by all tests."""

import atexit
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from tests.commands import forkserver

_pools: dict[int, "RankPool"] = {}


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls ``function(*args)`` on every rank of a gloo world, and returns what each rank returned, in rank order.

    ``function`` must be importable (module level), and it, its arguments and its results must pickle. An exception on
    any rank is raised here with that rank's traceback, and the pool is started afresh for the next call.
    """
    if world_size not in _pools:
        _pools[world_size] = RankPool(world_size)
    try:
        return _pools[world_size].call(function, *args)
    except BaseException:
        _pools.pop(world_size).close()
        raise


class RankPool:
    """``world_size`` processes with an initialised gloo group, fed through pipes."""

    def __init__(self, world_size: int, *, interpreted: bool = False) -> None:
        """interpreted: Triton interprets its kernels there."""
        self.directory = tempfile.TemporaryDirectory()
        context = forkserver()
        pipes = [context.Pipe() for _ in range(world_size)]
        self.pipes = [parent for parent, _ in pipes]
        store = os.path.join(self.directory.name, "store")
        self.processes = [
            context.Process(target=_serve, args=(rank, world_size, store, child, interpreted), daemon=True)
            for rank, (_, child) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        atexit.register(self.close)

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
        for pipe in self.pipes:  # pickled here, since the pipe's own way shares a tensor's memory, which is slower
            pipe.send_bytes(pickle.dumps((function, args)))
        results: list[Any] = [None] * len(self.pipes)
        waiting = dict(enumerate(self.pipes))
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting.values()), timeout)
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting)} did not answer within {timeout:.0f} s")
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                kind, value = pickle.loads(waiting.pop(rank).recv_bytes())
                if kind == "error":
                    raise RuntimeError(f"rank {rank}:\n{value}")
                results[rank] = value
        return results

    def close(self) -> None:
        atexit.unregister(self.close)
        for process in self.processes:
            process.kill()
            process.join()
        self.directory.cleanup()


def _serve(rank: int, world_size: int, store: str, pipe: Any, interpreted: bool) -> None:
    import torch
    import torch.distributed as dist

    if interpreted:
        _import_triton_anew()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = pickle.dumps(("result", function(*args)))
        except BaseException:
            answer = pickle.dumps(("error", traceback.format_exc()))
        pipe.send_bytes(answer)


def _import_triton_anew() -> None:
    """So that it interprets: that it decides when it is imported, and torch has imported it already."""
    os.environ["TRITON_INTERPRET"] = "1"
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        if not name.startswith("triton._C"):  # machine code, which is loaded once
            del sys.modules[name]
