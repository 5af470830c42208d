"""One rank's process: what it imports, how it ends, and where it leaves what it failed with."""

import ctypes
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from ..data.errors import UsageError


def preload(module: str) -> None:
    """Imports a module with all that it needs, for good: the garbage collector never looks at it again.

    numpy's own threads, which it starts when it is imported, are one: nothing here multiplies matrices by numpy, and
    every rank would start as many as the machine has cores.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()  # over a million objects, none of them garbage: a fifth of the time
    importlib.import_module(module)
    gc.freeze()
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
            if error.filename is None:  # not a file's
                raise
            raise UsageError(f"{error.filename}: {error.strerror}: check who may read and write it") from None

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
