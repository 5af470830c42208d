"""Whether a case fits into memory, estimated before it is started rather than left to the out-of-memory killer."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ...partial_fc.sampling import expected_rows
from .case import HeadCase

_BASE = 256 << 20
"""What a rank takes in addition, on a CPU: libraries' buffers, blocks."""
_KEEP = 1 << 30
"""The most that the probabilities take; the head's default."""
_OF_BATCH = 10
"""Matrices of the global batch [B, D] that pfc's head has at once: the batch, its directions, gradients, payloads."""
_SHARE = 0.95
"""Of the free memory that may be taken."""


def bytes_needed(case: HeadCase) -> int:
    """Peak bytes of one rank on its device: the C/ranks centers of D numbers with their optimizer's state, if they
    are stored there, and what the head adds.

    That of the baselines is counted from their code: copies of the centers [rows, D] and of the logits [B, rows].
    """
    stored = case.stored_rows
    rows = stored if case.head == "dense" else expected_rows(case.classes, case.ranks, case.rate, case.batch)
    centers, used, logits = 4 * stored * case.dim, 4 * rows * case.dim, 4 * case.batch * rows
    if case.head == "dense":  # centers, momentum, gradient; normalised, its gradient and temporaries of both
        return int(7 * centers + 7 * logits) + _BASE
    if (
        case.head == "peer"
    ):  # centers, momentum, gradient and its temporary; of the rows used copies and their gradients
        return int((3 if case.rate == 1 else 4) * centers + 4 * used + 4.25 * logits) + _BASE
    held = 4 * _OF_BATCH * case.batch * case.dim
    if case.storage == "device" or (case.storage == "host" and not torch.cuda.is_available()):
        held += stored * case.row_bytes
    if case.storage != "device" and case.rate < 1:  # this step's rows and the next one's
        held += 2 * rows * case.row_bytes
    if case.objective == "p2sgrad":  # where not by the Gram matrix: normalised rows, cosines, slopes
        return int(held + 2 * used + 2 * logits) + _BASE
    return int(held + min(logits, _KEEP)) + _BASE


def bytes_free() -> int:
    """Bytes that all ranks together may take: on a GPU those of the GPUs here, else the host's and the container's."""
    if torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
    return _host_free()


def why_not(case: HeadCase, limit: int | None = None) -> str:
    """One line that says what the case needs, where that is more than there is; empty where it fits.

    Args:
        limit: bytes of memory that all ranks together may take, where that is less than what is free.
    """
    for needed, free, where in _demands(case, limit):
        if needed > free:
            return (
                f"{case.head} with {case.classes:,} classes of {case.dim} numbers needs about {needed / 2**30:.1f} GiB "
                f"{where} on {case.processes} rank(s), {free / 2**30:.1f} GiB may be taken: take fewer --classes or a "
                "smaller --dim"
            )
    return ""


def _demands(case: HeadCase, limit: int | None) -> Iterator[tuple[float, float, str]]:
    """Bytes that are needed, bytes that may be taken, and where, of all ranks together."""
    stored = case.processes * case.stored_rows * case.row_bytes
    free = _SHARE * bytes_free()
    yield case.processes * bytes_needed(case), free if limit is None else min(free, limit), "of memory"
    if case.storage == "host" and torch.cuda.is_available():
        yield stored, _SHARE * _host_free(), "of the host's memory"
    if case.storage == "file":
        yield stored, _SHARE * shutil.disk_usage(case.storage_dir).free, f"in {case.storage_dir}"


def _host_free() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    free = int(found[1]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
