"""A thread in every rank that ends a run in which nothing moves any more, and says which rank everyone waits for.

Ranks work in lock-step, so one that stands still soon holds up all. Each rank's watchdog counts its own signs of life
into one number that all share (in the store of the process group). When that number has not moved for
``run.timeout_seconds``, each tells the others where its rank is, and all come to the same verdict: the rank that is
behind is to blame. It ends first, with its own stack as its error.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from . import failures

GRACE = 5.0
"""Seconds that the launcher has to see the end of the rank that is to blame, before the others end too."""
FILE_TRAFFIC = 1 << 20
"""Bytes read or written between two looks that count as a sign of life where a rank works on files."""


class Heartbeat:
    """Where this rank's work stands, as it says itself. A call costs less than a microsecond and touches no device."""

    def __init__(self) -> None:
        self.step, self.phase, self.phases, self.moments, self.on_files = 0, "starting", 0, 0, True
        self.listener: Callable[[str], None] | None = None
        """Hears of every phase, where somebody wants to."""

    def enter(self, phase: str, step: int | None = None, *, on_files: bool = False) -> None:
        """A new phase of the work begins, on every rank in the same order.

        Args:
            phase: what the rank does now, to be read in "rank 1 stands still in step 5, PHASE".
            step: the optimizer step; as before when None.
            on_files: reads or writes much in one call, so bytes that move count as signs of life too.
        """
        self.phase, self.on_files = phase, on_files
        self.step = self.step if step is None else step
        self.phases += 1
        if self.listener is not None:
            self.listener(phase)

    def moved(self) -> None:
        """The phase goes on; how often a rank says so need not be what the others do."""
        self.moments += 1


@dataclass
class Position:
    """Where a rank stands when the run has stood still."""

    rank: int
    host: str
    process_id: int
    step: int
    phase: str
    phases: int
    """How many phases it has entered: the rank with the fewest is behind."""
    collectives: int
    """How many collectives it has begun: among equals the rank with the fewest is behind."""
    collective: str | None
    """The one that its Python code is in, if it is in one."""
    stack: str

    @property
    def place(self) -> str:
        return f"step {self.step:,}, {self.phase}"


class Watchdog:
    """Watches one rank, from ``start`` to ``stop``.

    Args:
        heartbeat: what the rank says of itself.
        store: shared by the ranks; a connection of the watchdog's own.
        rank, world_size: of this process.
        timeout_seconds: how long the run may stand still.
    """

    def __init__(
        self, heartbeat: Heartbeat, store: dist.Store, rank: int, world_size: int, timeout_seconds: float
    ) -> None:
        self._heartbeat, self._store = heartbeat, store
        self._rank, self._world_size, self._timeout = rank, world_size, timeout_seconds
        self._interval = min(10.0, timeout_seconds / 10)
        self._store.set_timeout(timedelta(seconds=max(5.0, self._interval)))
        self._watched = threading.main_thread().ident
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        faulthandler.register(signal.SIGALRM)
        self._thread.start()

    def stop(self) -> None:
        """The rank has come to a good end."""
        self._done.set()
        self._thread.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        last, quiet_since = -1, time.monotonic()
        signs, traffic = (-1, -1), _file_traffic()
        while not self._done.wait(self._interval):
            self._wind_up()
            now, bytes_now = (self._heartbeat.phases, self._heartbeat.moments), _file_traffic()
            moved = now != signs or (self._heartbeat.on_files and bytes_now - traffic >= FILE_TRAFFIC)
            signs, traffic = now, bytes_now
            try:
                total = self._store.add("signs of life", int(moved))
            except RuntimeError:  # the store's host is gone: this rank's own signs must do
                total = last + moved
            if total != last:
                last, quiet_since = total, time.monotonic()
            elif time.monotonic() - quiet_since > self._timeout:
                self._end(time.monotonic() - quiet_since)

    def _wind_up(self) -> None:
        """Where code of C keeps the interpreter's lock, this thread stands still too. Then a signal's handler without
        Python shows the stacks while the others look for this rank, and a thread without Python ends it after them."""
        signal.setitimer(signal.ITIMER_REAL, self._timeout + self._interval)
        faulthandler.dump_traceback_later(self._timeout + 4 * self._interval + 2 * GRACE, exit=True)

    def _end(self, seconds: float) -> None:
        """Never returns."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        own = self._position()
        positions = self._exchange(own)
        blamed, text = verdict(positions, self._world_size, seconds)
        teller = positions.get(blamed, positions[min(positions)])
        if own.rank != teller.rank:
            time.sleep(GRACE)
        at = f"rank {teller.rank} ({teller.host}, process {teller.process_id})"
        message = f"Hang: {text}"
        failures.record(message, f"Where the main thread of {at} is, last call last:\n{teller.stack}{message}")
        os._exit(1)

    def _position(self) -> Position:
        assert self._watched is not None
        frame = sys._current_frames()[self._watched]
        return Position(
            self._rank,
            socket.gethostname(),
            os.getpid(),
            self._heartbeat.step,
            self._heartbeat.phase,
            self._heartbeat.phases,
            _collectives_begun(),
            collective_of(frame),
            "".join(traceback.format_stack(frame)),
        )

    def _exchange(self, own: Position) -> dict[int, Position]:
        """The positions of all ranks that tell theirs within a while, by rank."""
        positions = {own.rank: own}
        try:
            self._store.set(f"position/{own.rank}", json.dumps(asdict(own)))
            deadline = time.monotonic() + 2 * self._interval + 1
            missing = set(range(self._world_size)) - {own.rank}
            while missing and time.monotonic() < deadline:
                for rank in sorted(missing):
                    if self._store.check([f"position/{rank}"]):
                        positions[rank] = Position(**json.loads(self._store.get(f"position/{rank}")))
                        missing.remove(rank)
                time.sleep(0.1)
        except RuntimeError:
            pass  # without the store each speaks for itself
        return positions


def verdict(positions: dict[int, Position], world_size: int, seconds: float) -> tuple[int, str]:
    """Which rank all wait for, and a line that says so.

    Args:
        positions: of the ranks that have told theirs, by rank.
        world_size: number of ranks.
        seconds: how long nothing has moved.
    """
    still = f"no progress for {seconds:.0f} s (run.timeout_seconds)"
    silent = [rank for rank in range(world_size) if rank not in positions]
    if silent:
        waiting = _waiting(list(positions.values()))
        return silent[0], (
            f"{_ranks(silent)} of {world_size} gave no sign of life, {still}: its process is stopped or in code "
            f"that keeps Python's lock (then its stack is above), or its host is gone; {waiting}"
        )
    key = {rank: (p.phases, p.collectives, p.collective is not None) for rank, p in positions.items()}
    behind = [rank for rank in sorted(positions) if key[rank] == min(key.values())]
    first = positions[behind[0]]
    others = [position for rank, position in positions.items() if rank not in behind]
    if first.collective is None:
        text = f"{_ranks(behind)} of {world_size} ({first.host}) stand{'s' * (len(behind) == 1)} still in {first.place}"
    else:
        text = f"{_waiting([positions[rank] for rank in behind])} of {world_size}, without an answer from the others"
    return first.rank, f"{text}: {still}" + (f"; {_waiting(others)}" if others else "")


def collective_of(frame: FrameType | None) -> str | None:
    """The outermost function of torch.distributed that a stack is in, such as ``all_reduce``."""
    found = None
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.distributed_c10d":
            name = frame.f_code.co_name
            found = name if name != "wrapper" else found
        frame = frame.f_back
    return found


def _collectives_begun() -> int:
    """Of the default group; 0 while there is none, and where its backend does not count them."""
    group = dist.group.WORLD
    try:
        return 0 if group is None else group._get_sequence_number_for_group()  # pyright: ignore
    except RuntimeError:
        return 0


def _waiting(positions: list[Position]) -> str:
    """``ranks 0, 2 wait in all_reduce (step 5, backward pass)``, one part for each such place."""
    places: dict[str, list[int]] = {}
    for position in sorted(positions, key=lambda position: position.rank):
        what = f"in {position.collective} " if position.collective else ""
        places.setdefault(f"{what}({position.place})", []).append(position.rank)
    return ", ".join(f"{_ranks(ranks)} wait{'s' * (len(ranks) == 1)} {place}" for place, ranks in places.items())


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def _file_traffic() -> int:
    """Bytes that this process has read and written so far; 0 where the system does not count them."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    values = {name: int(value) for name, _, value in (line.partition(":") for line in lines)}
    return values["rchar"] + values["wchar"] + values["read_bytes"]
