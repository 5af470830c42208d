"""One rank's process: what it imports, how it ends, where it leaves what it failed with, and how that is shown."""

import ctypes
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from ..data.errors import UsageError, forbidden

WRONG_USE = "UsageError: "
"""What the recorded message of a UsageError begins with."""


@dataclass
class Failure:
    """How one rank ended, when it did not end well."""

    rank: int
    exit_code: int
    """As subprocess has it: below zero, the signal that killed the process."""
    message: str
    """``Type: text`` of the exception; empty when the rank left none."""
    trace: str
    """The traceback; empty when the rank left none."""
    time: float
    """Seconds since the epoch: when the exception was recorded, or when the process was seen dead."""

    @property
    def is_wrong_use(self) -> bool:
        """By its exception: the exit code is another one where the others' end came in between."""
        return self.message.startswith(WRONG_USE)

    @property
    def summary(self) -> str:
        if self.message:
            return " ".join(self.message.split())
        if self.exit_code < 0:
            return f"was killed by {signal.Signals(-self.exit_code).name}"
        return f"ended with exit code {self.exit_code}"

    def show(self, world_size: int) -> int:
        """Prints the failure to stderr; returns the exit code of the whole command."""
        if self.is_wrong_use:
            print(f"pfc: {self.message.removeprefix(WRONG_USE)}", file=sys.stderr)
            return 2
        if self.trace:
            print(f"pfc: rank {self.rank} of {world_size} failed:\n{self.trace.rstrip()}", file=sys.stderr)
        else:
            memory = "; the machine may have run out of memory" if self.exit_code == -signal.SIGKILL else ""
            print(f"pfc: rank {self.rank} of {world_size} {self.summary}{memory}", file=sys.stderr)
        return 1


def preload(module: str) -> None:
    """Imports a module with all that it needs, for good: the garbage collector never looks at it again.

    numpy's own threads, which it starts when it is imported, are one: nothing here multiplies matrices by numpy, and
    every rank would start as many as the machine has cores.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()  # over a million objects, none of them garbage: a fifth of the time
    try:
        importlib.import_module(module)
        gc.freeze()
    finally:
        gc.enable()


def run_rank(work: Callable[[], int | None], *, told: bool) -> int:
    """Calls ``work()`` as one rank, and leaves what it failed with where the starting process finds it.

    Args:
        told: whether this process says itself what went wrong; otherwise the starting one does.

    Returns:
        The rank's exit code: 2 for a UsageError, 130 for Ctrl-C, 1 for any other exception.
    """
    from torch.distributed.elastic.multiprocessing.errors import record

    from ..engine.ranks.failures import PeerFailed

    def working() -> int | None:
        try:
            return work()
        except UsageError as error:
            # Of that very type, also where it was a special kind: the starting process knows it by its name.
            raise UsageError(str(error)) from None
        except PermissionError as error:
            raise forbidden(error) from None

    try:
        return record(working)() or 0
    except PeerFailed as error:  # what it says has been told by the other rank
        return 2 if error.wrong_use else 1
    except UsageError as error:
        if told:
            print(f"pfc: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        if told:
            traceback.print_exc()
        return 1


def leave(exit_code: int) -> NoReturn:
    """Ends this process at once: taking torch apart in order costs over a second, and after an error the threads of the
    process group would abort it or hold it up."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # closed: there was nobody to read it
            stream.flush()
    os._exit(exit_code)


def die_with(parent: int) -> None:
    """The kernel kills this rank when its parent dies in a way that leaves it no time to stop its ranks."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
