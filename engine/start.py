"""Where a run begins or goes on: decided by the first rank, told to all, the same after a restart."""

import hashlib
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from ..data.errors import UsageError
from . import checkpoint
from .checkpoint import Found
from .config import Config
from .distributed import World


@dataclass(frozen=True)
class Start:
    """What all ranks begin with.

    Attributes:
        found: the checkpoint to go on from; None where the run begins.
        origin: what the run was told to begin with, as its checkpoints keep it: "auto", "never", or a path.
    """

    found: Found | None
    origin: str


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
    run_dir, mark = config.run.path, f".{secrets.token_hex(8)}"
    start, problem = Start(None, resume), None
    if world.is_main:
        try:
            start = _choose(run_dir, resume)
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / mark).touch()
        except UsageError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}: give another run.dir"
    mine = (start, mark, hashlib.sha256(config.to_yaml().encode()).hexdigest(), socket.gethostname())
    told = [mine] * world.size
    dist.all_gather_object(told, mine)
    start, mark, first_hash, first_host = told[0]
    try:
        for rank, (_, _, one_hash, host) in enumerate(told):
            if one_hash != first_hash:
                problem = problem or (
                    f"rank {rank} ({host}) was given another configuration than rank 0 ({first_host}): start all ranks "
                    "with the same file and the same key=value"
                )
        if problem is None and not (run_dir / mark).exists():
            problem = (
                f"{run_dir.absolute()} on {socket.gethostname()} (rank {world.rank}) is not the folder that rank 0 "
                f"({first_host}) writes to: put run.dir on a disk that all hosts share"
            )
        problem = checkpoint.agreed(problem)  # after it, all have looked
    finally:
        if world.is_main:
            (run_dir / mark).unlink(missing_ok=True)
    if problem is not None:
        raise UsageError(problem)
    return start


def _choose(run_dir: Path, resume: str) -> Start:
    latest = checkpoint.find_latest(run_dir)
    if resume == "auto":
        return Start(latest, "auto" if latest is None else latest.state().get("origin", "auto"))
    origin = resume if resume == "never" else os.path.abspath(resume)
    if latest is not None and latest.state().get("origin") == origin:
        return Start(latest, origin)
    if resume != "never":
        return Start(checkpoint.find(Path(resume)), origin)
    if latest is not None:
        raise UsageError(
            f"{run_dir} holds a run that got to step {latest.step}: go on with --resume auto, give run.name "
            "another name, or move it away"
        )
    return Start(None, origin)
