"""How many ranks and cores this machine offers."""

import multiprocessing
import os
import signal
import sys
from typing import NoReturn

from ..data.errors import UsageError


def default_ranks() -> int:
    """One rank for each GPU; without a GPU two, so that the sharded path is what runs (one on a single core).

    Raises:
        UsageError: this machine's GPUs could not be counted.
    """
    return gpus() or min(2, usable_cores())


def gpus() -> int:
    """How many GPUs this machine has.

    Raises:
        UsageError: they could not be counted.
    """
    # Counted in a process of its own: one that has initialised CUDA can no longer fork ranks that use it.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_count_devices, args=(writer,))
    process.start()
    os.close(writer)
    with open(reader) as pipe:
        told = pipe.read()
    process.join()
    if not told.isdigit():
        raise UsageError(
            f"this machine's GPUs could not be counted ({told or 'a crash'}): see pfc doctor, or give --nproc"
        )
    return int(told)


def _count_devices(writer: int) -> NoReturn:
    """Writes their number, or in one line why it is unknown."""
    try:
        import torch

        told = str(torch.accelerator.device_count())
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
    os.write(writer, told.encode())
    os._exit(0)


def usable_cores() -> int:
    """Cores that this process may run on, which in a container or a job can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
