"""Writing one checkpoint, by all ranks together: whole under its name, or not at all."""

import dataclasses
import errno
import json
import shutil
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from .directory import CONFIG, FOLDER, LABELS, Best, install, name_of, tidy
from .reading import METADATA, STATE

_T = TypeVar("_T")
_CHUNK_BYTES = 1 << 26
HIDDEN = ".step-"
"""What the names of directories begin with that are no checkpoints: being written, or being removed."""


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor.

    Attributes:
        rows: [n, ...], on any device; n may be 0.
        start: which row of the whole the first one is.
        total: rows of the whole.
        dtype: as which they are written, one piece at a time, so that pieces mapped from a file take no memory.
    """

    rows: Tensor
    start: int
    total: int
    dtype: torch.dtype


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
            tidy(run_dir, keep, best)
    return problem


def agreed(problem: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """On every rank the first rank's problem that there is; None where no rank has one. A collective."""
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, problem, group=group)
    return next((one for one in told if one is not None), None)


def from_first_rank(value: _T) -> _T:
    """On every rank what the first has. A collective."""
    told = [value]
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    return told[0]


def save_alone(folder: Path, tensors: dict[str, Tensor], pieces: Mapping[str, Sequence[Piece]]) -> None:
    """Writes torch.distributed.checkpoint's files, in this process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(tensors, checkpoint_id=folder, planner=_PiecesPlanner(pieces), no_dist=True)


def _prepare(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for left_over in temporary.parent.glob(f"{HIDDEN}*"):  # of a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir()


def _write_tensors(temporary: Path, content: Content, group: dist.ProcessGroup | None) -> str | None:
    planner = _PiecesPlanner({name: [piece] for name, piece in content.pieces.items()})
    try:
        dcp.save(dict(content.tensors), storage_writer=_Writer(temporary), planner=planner, process_group=group)
    except CheckpointException as error:  # the same on every rank
        for rank, (cause, _) in sorted(error.failures.items()):
            if not isinstance(cause, OSError):
                raise RuntimeError(str(error)) from None
            return f"rank {rank}: {_told(cause)}"
    return None


def _complete(folder: Path, temporary: Path, content: Content) -> None:
    (temporary / CONFIG).write_text(content.config, encoding="utf-8")
    state = {"step": content.step, "written": time.time(), **content.state}
    (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    if content.labels is not None:
        (temporary / LABELS).write_bytes(content.labels)
    install(temporary, folder / name_of(content.step))


def _refused(action: Callable[[], None]) -> str | None:
    try:
        action()
    except OSError as error:
        return _told(error)
    return None


def _told(error: OSError) -> str:
    """``/path: No space left on device``"""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


class _PiecesPlanner(DefaultSavePlanner):
    """Plans plain tensors as torch does, and pieces as a rank's shards of those tensors.

    torch's own plan for a DTensor takes one shard of a rank, in the dtype that it has in memory: a converter has those
    of all ranks, mapped from files, and an asynchronous save their copies on the host.
    """

    def __init__(self, pieces: Mapping[str, Sequence[Piece]]) -> None:
        super().__init__()
        self._pieces: dict[tuple[str, torch.Size | None], Piece] = {}
        self._items: list[WriteItem] = []
        for name, parts in pieces.items():
            for piece in (chunk for part in parts for chunk in _chunks(part)):
                offset = torch.Size((piece.start, *[0] * (piece.rows.ndim - 1)))
                self._pieces[name, offset] = piece
                data = TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=offset, sizes=piece.rows.shape),
                    properties=TensorProperties(dtype=piece.dtype),
                    size=torch.Size((piece.total, *piece.rows.shape[1:])),
                )
                self._items.append(WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data))

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=[*plan.items, *self._items])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        piece = self._pieces.get((index.fqn, index.offset))
        return super().lookup_object(index) if piece is None else piece.rows.to(piece.dtype).contiguous()


def _chunks(piece: Piece) -> Iterator[Piece]:
    """Its rows in parts of which one at a time is copied to be written, and read back."""
    if not len(piece.rows):
        return
    size = max(1, _CHUNK_BYTES * len(piece.rows) // max(1, piece.rows.numel() * piece.dtype.itemsize))
    for start in range(0, len(piece.rows), size):
        yield dataclasses.replace(piece, rows=piece.rows[start : start + size], start=piece.start + start)


class _Writer(FileSystemWriter):
    """torch's writer, which tells a full disk as such.

    torch.save raises an error of its own at the end of a file that the disk refused: the disk's is in its context, and
    would be lost on the way to the other ranks.
    """

    def write_data(self, plan: Any, planner: Any) -> Any:
        with _disk_errors(Path(self.path) / f"{plan.storage_data.prefix}0.distcp"):
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: Any) -> None:
        """On the first rank, when all have written: a disk that not all of them share is found before the renaming."""
        for place in sorted({one.storage_data.relative_path for rank in results for one in rank}):
            if not (Path(self.path) / place).is_file():
                raise FileNotFoundError(
                    errno.ENOENT, "rank 0 does not see this file of another rank; do all hosts share run.dir?", place
                )
        with _disk_errors(Path(self.path) / METADATA):
            super().finish(metadata, results)


@contextmanager
def _disk_errors(path: Path) -> Generator[None]:
    """Raises the error of the disk that is behind another error, with the name of the file."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        cause.filename = cause.filename or str(path)
        raise cause from None
