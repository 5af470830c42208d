"""Where a run begins or goes on: decided by the first rank, told to all, the same after a restart."""

import hashlib
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from ..data.errors import UsageError
from . import checkpoint
from .checkpoint import Found
from .config import Config
from .ranks.distributed import World

_PATIENCE = 60.0
"""Seconds; NFS keeps "no such file" for 30 unless it is mounted otherwise."""


@dataclass(frozen=True)
class Start:
    """What all ranks begin with.

    Attributes:
        found: the checkpoint to go on from; None where the run begins.
        origin: what the run was told to begin with, as its checkpoints keep it: "auto", "never", or a path.
        repeated: whether these words have led to ``found`` in an earlier start.
    """

    found: Found | None
    origin: str
    repeated: bool = False

    def told(self) -> list[str]:
        """A line where somebody might have expected another start."""
        if not self.repeated or self.found is None:
            return []
        return [
            f"start      step {self.found.step:,}, which an earlier start with --resume {self.origin} led to; for a "
            "new beginning give run.name another name"
        ]


def agree(config: Config, world: World, resume: str) -> Start:
    """Chooses the start of a run, for all ranks together.

    Args:
        config: as it was read.
        world: this rank's place.
        resume: "auto" goes on from the run's latest checkpoint where there is one; "never" begins; a path goes on from
            the checkpoint, or the run, there. Once the run has a checkpoint that this very start has led to, it goes
            on from that: so a job that is started again by torchrun or a cluster, with the same words, loses nothing.

    Raises:
        UsageError: there is no such checkpoint; the run has got somewhere without "never"; the ranks were given
            different configurations; a host does not see the run's directory as the first rank does.
    """
    run_dir, mark = config.run.path, f".start-{secrets.token_hex(8)}"
    start, problem = Start(None, resume), None
    if world.is_main:
        try:
            start = _choose(run_dir, resume)
            problem = _refused(run_dir / mark)
        except UsageError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}: a checkpoint there cannot be read"
    mine = (start, mark, hashlib.sha256(config.to_yaml().encode()).hexdigest(), socket.gethostname(), problem)
    told = [mine] * world.size
    dist.all_gather_object(told, mine)
    start, mark, first_hash, first_host, problem = told[0]
    try:
        for rank, (_, _, one_hash, host, _) in enumerate(told):
            if one_hash != first_hash:
                problem = problem or (
                    f"rank {rank} ({host}) was given another configuration than rank 0 ({first_host}): start all ranks "
                    "with the same file and the same key=value"
                )
        if problem is None and not _appears(run_dir / mark, world):
            problem = (
                f"{run_dir.absolute()} on {socket.gethostname()} (rank {world.rank}) is not the folder that rank 0 "
                f"({first_host}) writes to: put run.dir on a disk that all hosts share"
            )
        problem = checkpoint.agreed(problem)  # after it, all have looked
    finally:
        if world.is_main:
            (run_dir / mark).unlink(missing_ok=True)
    if problem is not None:
        dist.barrier()  # the end of one ends the others: not before the mark is gone
        raise UsageError(problem)
    return start


def _refused(mark: Path) -> str | None:
    """Makes the folder and the file that all ranks are to see; what speaks against it."""
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        for old in mark.parent.glob(".start-*"):  # of a start that was killed
            old.unlink(missing_ok=True)
        mark.touch()
    except OSError as error:
        return f"{error.filename}: {error.strerror}: give another run.dir"
    return None


def _appears(mark: Path, world: World) -> bool:
    """Whether the file shows here: on a network disk after as long as a host remembers that there was no folder."""
    deadline = time.monotonic() + (_PATIENCE if world.size > 1 else 0.0)
    while not mark.exists():
        if time.monotonic() > deadline:
            return False
        world.heartbeat.moved()
        time.sleep(0.2)
    return True


def _choose(run_dir: Path, resume: str) -> Start:
    latest = checkpoint.find_latest(run_dir)
    if resume == "auto":
        return Start(latest, "auto" if latest is None else latest.state().get("origin", "auto"))
    origin = resume if resume == "never" else os.path.abspath(resume)
    if latest is not None and latest.state().get("origin") == origin:
        return Start(latest, origin, repeated=True)
    if resume != "never":
        return Start(checkpoint.find(Path(resume)), origin)
    if latest is not None:
        raise UsageError(
            f"{run_dir} holds a run that got to step {latest.step}: go on with --resume auto, give run.name "
            "another name, or move it away"
        )
    return Start(None, origin)
