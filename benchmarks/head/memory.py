"""Whether a case fits into memory, estimated before it is started rather than left to the out-of-memory killer."""

import re
from pathlib import Path

import torch

from ...partial_fc.sampling import expected_rows
from .case import HeadCase

_BASE = 256 << 20
"""What a rank takes in addition, on a CPU: libraries' buffers, blocks."""
_KEEP = 1 << 30
"""The most that the probabilities take; the head's default."""
_SHARE = 0.95
"""Of the free memory that may be taken."""


def bytes_needed(case: HeadCase) -> int:
    """Peak bytes of one rank: C/ranks centers of D float32 numbers with their momentum, and what the head adds.

    That of the baselines is counted from their code: copies of the centers [rows, D] and of the logits [B, rows].
    """
    stored = -(-case.classes // case.ranks)
    rows = stored if case.head == "dense" else expected_rows(case.classes, case.ranks, case.rate, case.batch)
    centers, used, logits = 4 * stored * case.dim, 4 * rows * case.dim, 4 * case.batch * rows
    if case.head == "dense":  # centers, momentum, gradient; normalised, its gradient and temporaries of both
        return int(7 * centers + 7 * logits) + _BASE
    if (
        case.head == "peer"
    ):  # centers, momentum, gradient and its temporary; of the rows used copies and their gradients
        return int((3 if case.rate == 1 else 4) * centers + 4 * used + 4.25 * logits) + _BASE
    if case.objective == "p2sgrad":  # where not by the Gram matrix: normalised rows, cosines, slopes
        return int(2 * centers + 2 * used + 2 * logits) + _BASE
    return int(2 * centers + min(logits, _KEEP)) + _BASE


def bytes_free() -> int:
    """Bytes that all ranks together may take: on a GPU those of the GPUs here, else the host's and the container's."""
    if torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    free = int(found[1]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def why_not(case: HeadCase) -> str:
    """One line that says what the case needs, where that is more than there is; empty where it fits."""
    needed, free = case.ranks * bytes_needed(case), bytes_free()
    if needed <= _SHARE * free:
        return ""
    return (
        f"{case.head} with {case.classes:,} classes of {case.dim} numbers needs about {needed / 2**30:.1f} GiB on "
        f"{case.ranks} rank(s), {free / 2**30:.1f} GiB are free: take fewer --classes or a smaller --dim"
    )
