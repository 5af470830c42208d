"""Writing one checkpoint, by all ranks together: whole under its name, or not at all.

Everything goes into a temporary directory, every file and the directory are brought to the disk (fsync), and then the
directory gets its name: what is called ``step-…`` is complete, whenever the power fails.
"""

import errno
import io
import json
import os
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata

from .directory import (
    BEST,
    CONFIG,
    FOLDER,
    LABELS,
    LATEST,
    STATE,
    Best,
    Found,
    find_all,
    find_latest,
    name_of,
    outdated,
    point,
)
from .pieces import Piece, PiecesPlanner

_T = TypeVar("_T")
HIDDEN = ".step-"
"""What the names of directories begin with that are no checkpoints: being written, or being removed."""


@dataclass(frozen=True)
class Content:
    """What a rank writes.

    Attributes:
        step: optimizer steps done.
        tensors: whole ones, which this rank alone writes.
        pieces: this rank's rows of the sharded ones.
        state: counters, as JSON can hold them.
        config: the run's configuration as YAML.
        labels: the data set's label map, the bytes of its ``labels.json``; None where it has none.
    """

    step: int
    tensors: Mapping[str, Tensor]
    pieces: Mapping[str, Piece]
    state: Mapping[str, Any]
    config: str
    labels: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Of all tensors of this rank."""
        return sum(tensor.nbytes for tensor in self.tensors.values()) + sum(one.nbytes for one in self.pieces.values())


def write(
    run_dir: Path, content: Content, *, keep: int, best: Best | None = None, group: dist.ProcessGroup | None = None
) -> str | None:
    """Writes a checkpoint and removes those that are no longer kept. Called by all ranks together.

    Args:
        run_dir: of the run.
        content: of this rank.
        keep: how many of the latest stay.
        best: what makes a checkpoint the best, which stays too.
        group: of gloo, for the ranks to agree over.

    Returns:
        None, or on every rank the same line about what the disk refused, in which case nothing has changed on it.
    """
    folder = run_dir / FOLDER
    temporary = folder / f"{HIDDEN}{content.step:08d}.partial"
    is_main = dist.get_rank() == 0
    problem = agreed(_refused(lambda: _prepare(temporary)) if is_main else None, group)
    if problem is None:
        problem = _write_tensors(temporary, content, group)
    if problem is None:
        problem = agreed(_refused(lambda: _complete(folder, temporary, content)) if is_main else None, group)
    if problem is not None and is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    elif is_main:
        with suppress(OSError):  # what is left over is removed after the next save
            _tidy(run_dir, keep, best)
    return problem


def agreed(problem: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """On every rank the first rank's problem that there is; None where no rank has one. A collective."""
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, problem, group=group)
    return next((one for one in told if one is not None), None)


def _prepare(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for left_over in temporary.parent.glob(f"{HIDDEN}*"):  # of a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir()


def _write_tensors(temporary: Path, content: Content, group: dist.ProcessGroup | None) -> str | None:
    planner = PiecesPlanner({name: [piece] for name, piece in content.pieces.items()})
    try:
        dcp.save(dict(content.tensors), storage_writer=_Writer(temporary), planner=planner, process_group=group)
    except CheckpointException as error:  # the same on every rank
        for rank, (cause, _) in sorted(error.failures.items()):
            if not isinstance(cause, OSError):
                raise RuntimeError(str(error)) from None
            return f"rank {rank}: {_told(cause)}"
    return None


def _complete(folder: Path, temporary: Path, content: Content) -> None:
    final = folder / name_of(content.step)
    (temporary / CONFIG).write_text(content.config, encoding="utf-8")
    state = {"step": content.step, "written": time.time(), **content.state}
    (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    if content.labels is not None:
        (temporary / LABELS).write_bytes(content.labels)
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    replaced = None
    if final.exists():  # the run was taken up again at an earlier step and has come here once more
        _point_elsewhere(folder, final)
        replaced = _set_aside(final)
    os.rename(temporary, final)
    sync(folder)
    point(folder, LATEST, final.name)
    sync(folder)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def from_first_rank(value: _T) -> _T:
    """On every rank what the first has. A collective."""
    told = [value]
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    return told[0]


def go_back(found: Found, later: Sequence[Found]) -> None:
    """Makes ``found`` the latest and removes the ``later`` ones.

    Killed at any moment, ``found`` is the latest, and what is half removed does not look like a checkpoint.
    """
    if not later:
        return
    folder = found.path.parent
    point(folder, LATEST, found.path.name)
    sync(folder)
    for one in sorted(later, key=lambda one: -one.step):
        _point_elsewhere(folder, one.path)
        shutil.rmtree(_set_aside(one.path), ignore_errors=True)


def _point_elsewhere(folder: Path, old: Path) -> None:
    others = [found for found in find_all(folder.parent) if found.path != old]
    for link in (LATEST, BEST):
        if (folder / link).is_symlink() and (folder / link).readlink().name == old.name:
            if others:
                point(folder, link, max(others, key=lambda found: found.written).path.name)
            else:
                (folder / link).unlink()


def _tidy(run_dir: Path, keep: int, best: Best | None) -> None:
    folder, checkpoints = run_dir / FOLDER, find_all(run_dir)
    champion = best.of(checkpoints) if best is not None else None
    if champion is not None:
        point(folder, BEST, champion.path.name)
    elif (folder / BEST).is_symlink():
        (folder / BEST).unlink()
    latest = find_latest(run_dir)
    for old in outdated(checkpoints, keep, [one for one in (champion, latest) if one is not None]):
        shutil.rmtree(_set_aside(old.path), ignore_errors=True)


def _set_aside(path: Path) -> Path:
    """Takes its name away first: what is half removed must not look like a checkpoint."""
    hidden = path.with_name(f".{path.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    return hidden


def sync(path: Path) -> None:
    """Brings a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(action: Any) -> str | None:
    try:
        action()
    except OSError as error:
        return _told(error)
    return None


def _told(error: OSError) -> str:
    """``/path: No space left on device``"""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


class _Writer(FileSystemWriter):
    """torch's writer, which tells a full disk as such: torch.save itself loses the error of a file that it writes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs = self._files = _Files()

    def write_data(self, plan: Any, planner: Any) -> Any:
        with self._files.telling():
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: Any) -> None:
        """On the first rank, when all have written: a disk that not all of them share is found before the renaming."""
        for place in sorted({one.storage_data.relative_path for rank in results for one in rank}):
            if not (Path(self.path) / place).is_file():
                raise FileNotFoundError(
                    errno.ENOENT, "rank 0 does not see this file of another rank; do all hosts share run.dir?", place
                )
        with self._files.telling():
            super().finish(metadata, results)


class _Files(FileSystem):
    """Files that remember which error one of them had first."""

    def __init__(self) -> None:
        self.error: OSError | None = None

    @contextmanager
    def telling(self) -> Generator[None]:
        try:
            yield
        except Exception:
            if self.error is not None:
                raise self.error from None
            raise

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase]:
        with _Stream(self, Path(path), mode) as stream:
            yield cast(io.IOBase, stream)


class _Stream(io.FileIO):
    def __init__(self, files: _Files, path: Path, mode: str) -> None:
        self._files, self._path = files, path
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        """All of it, as files with a buffer do."""
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            try:
                written += super().write(view[written:]) or 0
            except OSError as error:
                error.filename = str(self._path)
                self._files.error = self._files.error or error
                raise
        return written
