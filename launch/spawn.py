"""Starts the ranks of one machine and brings them down together: what ``pfc train`` uses instead of torchrun.

No restarts and no second machine: that is torchrun's work. In exchange the ranks are forks of one process, so that
torch is imported once for all of them; a failure is told once, at the end and by the rank that caused it; every
address is the loopback's; and a rank never outlives the command.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..data.errors import UsageError
from ..engine.ranks.stopping import EXIT_CODES
from .machine import usable_cores
from .rank import Failure, die_with, leave, run_rank

STOP_GRACE = 300.0
"""Seconds that a stopped run has to finish its step and save; a second Ctrl-C ends it at once."""
FAILURE_GRACE = 5.0
"""Seconds that the other ranks have to end after one has failed: they cannot save without it."""
POLL_SECONDS = 0.02
"""How often the starting process looks at its ranks, and at the signals that it was sent."""
SIGNAL_LEAD = 0.5
"""A killed rank is seen dead a moment after its peers see their connections close, on a busy machine some tenths of a
second: its death counts as earlier. Not that of a rank which was told to end because another had failed."""
STOPPED = (128 + signal.SIGINT, *EXIT_CODES.values())
"""Exit codes of a rank that was sent the signal itself, and has saved."""
SECOND_HAND = "PeerFailed: "
"""What the recorded message of a rank begins with that could not go on without another one."""
_PORT = b"%05d"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_fork = multiprocessing.get_context("fork")


def run_ranks(work: Callable[[], int | None], world_size: int) -> int:
    """Calls ``work()`` on ``world_size`` ranks of this machine, and returns the exit code for the command.

    The ranks are forks of this process, which must not have used CUDA nor torch's threads; what they need is best
    imported before (``rank.preload``). Each finds the usual variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, ...)
    in its environment, so ``torch.distributed.init_process_group()`` needs no argument. The first rank to fail takes
    the others down; its error is printed last. SIGINT, SIGTERM and SIGHUP reach every rank as SIGTERM, SIGUSR1 as
    itself.

    Args:
        work: what a rank does; returns its exit code, None for 0.

    Returns:
        0 when every rank returned 0; 2 when the failing rank's exception was a UsageError; 75 when SIGUSR1 and 128 + n
        when another signal n stopped the run; 1 for anything else.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, nobody learns of a process's end
    with tempfile.TemporaryDirectory(prefix="pfc-") as folder, _stop_signals() as signals:
        ranks = RankGroup(Path(folder), world_size)
        try:
            ranks.fork(work)
            store = ranks.meet()
            stopped_by = _wait(ranks, signals)
        finally:
            ranks.kill()
        failures = ranks.failures()
    del store  # its server ends here, after the last rank

    if stopped_by and all(not failure.message for failure in failures):
        return EXIT_CODES.get(signal.Signals(stopped_by), 128 + stopped_by)
    if not failures:
        return 0
    cause, *others = failures
    if cause.exit_code in STOPPED and not cause.message:
        return cause.exit_code
    for other in others:
        second_hand = other.message.startswith(SECOND_HAND) or other.message == cause.message
        if other.message and not second_hand and not cause.is_wrong_use:
            print(f"pfc: after that, rank {other.rank}: {other.summary}", file=sys.stderr)
    return cause.show(world_size)


class RankGroup:
    """The processes of all ranks, each in a session of its own together with whatever it starts."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.folder = folder
        self.world_size = world_size
        self.processes: list[ForkProcess] = []
        self.running: set[int] = set()
        self.deaths: dict[int, float] = {}
        self.port_reader, self.port_writer = os.pipe()

    def fork(self, work: Callable[[], int | None]) -> None:
        """Starts all ranks, which wait for ``meet``.

        Raises:
            UsageError: the machine allows no more processes, or has no more memory.
        """
        # Signals wait until a rank has its own handlers: with this process's it would only note them.
        with _held_back(_SIGNALS):
            for rank in range(self.world_size):
                process = _fork.Process(target=self._be_rank, args=(rank, os.getpid(), work))
                try:
                    process.start()
                except OSError as error:
                    raise UsageError(
                        f"rank {rank} of {self.world_size} could not be started: {error.strerror}"
                    ) from None
                self.processes.append(process)
                self.running.add(rank)
        os.close(self.port_reader)

    def meet(self) -> object:
        """Tells the ranks where they meet: in a store that lives here while the returned object does.

        It has its port already, so that no other process can get it first. Its threads start after the last fork.
        """
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with suppress(BrokenPipeError):  # every rank has ended already
            os.write(self.port_writer, _PORT % store.port * len(self.processes))
        os.close(self.port_writer)
        return store

    def ended(self) -> list[int]:
        """Exit codes of the ranks that have ended since the last call; below zero, the signal that killed one."""
        now = {rank: code for rank in sorted(self.running) if (code := self.processes[rank].exitcode) is not None}
        self.deaths |= dict.fromkeys(now, time.time())
        self.running -= now.keys()
        return list(now.values())

    def terminate(self, number: int = signal.SIGTERM) -> None:
        for rank in self.running:
            process = self.processes[rank]
            if process.exitcode is None:
                os.kill(_id(process), number)

    def kill(self) -> None:
        """Ends every rank and everything that it started."""
        for process in self.processes:
            with suppress(ProcessLookupError):  # the whole session has ended already
                os.killpg(_id(process), signal.SIGKILL)
            process.kill()  # where it had no session of its own yet
        for process in self.processes:
            process.join()

    def failures(self) -> list[Failure]:
        """The ended ranks that did not end well, the cause first."""
        ended = [self._failure(rank, process.exitcode or 0) for rank, process in enumerate(self.processes)]
        return sorted((failure for failure in ended if failure.exit_code), key=lambda failure: failure.time)

    def _failure(self, rank: int, exit_code: int) -> Failure:
        report = self._report(rank)
        try:
            recorded = json.loads(report.read_text(encoding="utf-8"))["message"]
        except (FileNotFoundError, ValueError):  # none, or cut off by a kill
            lead = SIGNAL_LEAD if exit_code < 0 and exit_code != -signal.SIGTERM else 0.0
            moment = self.deaths.get(rank, time.time()) - lead
            return Failure(rank, exit_code, "", "", moment)
        return Failure(
            rank, exit_code, recorded["message"], recorded["extraInfo"]["py_callstack"], report.stat().st_mtime
        )

    def _report(self, rank: int) -> Path:
        return self.folder / f"error-{rank}.json"

    def _be_rank(self, rank: int, parent: int, work: Callable[[], int | None]) -> NoReturn:
        """What a forked process does."""
        os.setsid()
        die_with(parent)
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        # It comes as SIGTERM from the starting process. Sent to all processes of one name, it would end ranks that
        # have not saved.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)  # for what a rank starts; multiprocessing replaces Python's sys.stdin alone
        if nothing:
            os.close(nothing)
        os.close(self.port_writer)
        port = os.read(self.port_reader, len(_PORT % 0))
        os.close(self.port_reader)
        if not port:  # the starting process has given up
            os._exit(1)
        if "OMP_NUM_THREADS" not in os.environ:  # torch read the variable when it was imported
            import torch

            threads = max(1, usable_cores() // self.world_size)
            torch.set_num_threads(threads)
            os.environ["OMP_NUM_THREADS"] = str(threads)
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port.decode(),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank opens a store at that address: it is the parent's
            "TORCHELASTIC_ERROR_FILE": str(self._report(rank)),
        }
        leave(run_rank(work, told=False))


def _id(process: ForkProcess) -> int:
    assert process.pid is not None  # it was started
    return process.pid


def _wait(ranks: RankGroup, signals: list[int]) -> int:
    """Until every rank has ended, or has had the time to; returns the signal that stopped the run, or 0."""
    stopped_by, deadline = 0, float("inf")
    while ranks.running and time.monotonic() < deadline:
        if any(exit_code < 0 or (exit_code > 0 and not stopped_by) for exit_code in ranks.ended()):
            ranks.terminate()
            deadline = min(deadline, time.monotonic() + FAILURE_GRACE)
        while signals:
            number = signals.pop(0)
            if stopped_by and number == signal.SIGINT:
                return stopped_by
            if not stopped_by:
                if number == signal.SIGINT:
                    print("\npfc: stopping; Ctrl-C again ends it at once", file=sys.stderr)
                stopped_by = number
                ranks.terminate(number if number == signal.SIGUSR1 else signal.SIGTERM)
                deadline = min(deadline, time.monotonic() + STOP_GRACE)
        time.sleep(POLL_SECONDS)
    return stopped_by


@contextmanager
def _held_back(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Signals that come meanwhile are delivered at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM, SIGHUP and SIGUSR1 instead of letting them end this process."""
    received: list[int] = []

    def collect(number: int, _: FrameType | None) -> None:
        received.append(number)

    previous = {}
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, for one, ignores SIGHUP on purpose
            previous[number] = signal.signal(number, collect)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
