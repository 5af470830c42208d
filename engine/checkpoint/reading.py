"""One checkpoint, read: its counters, its table of tensors, the tensors themselves. No code in its files is run.

torch.distributed.checkpoint writes the table, ``.metadata``, as a pickle of protocol 4, and reads it with pickle.load,
which runs any code in it. torch.load(weights_only=True) cannot take its place: it reads protocol 2 only, and checks
classes but not what their objects hold. So pfc reads the table itself: inert stand-ins take the places of all objects,
new ones at every name; then torch's objects are made from what they hold, after a look at every part: names of files
that stay in the directory, tensors and nothing but tensors (torch would unpickle an entry of another kind). The tensors
torch loads as weights only.
"""

import io
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ...data.errors import UsageError

STATE, METADATA = "state.json", ".metadata"
_KNOWN = {
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.Size",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # Python 3.13
}
"""What torch's tables name, besides dtypes."""


@dataclass(frozen=True)
class Found:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """The counters that were saved with it.

        Raises:
            UsageError: the file is damaged.
        """
        path = self.path / STATE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read ({error}); take another checkpoint") from None
        if not isinstance(state, dict) or not state.keys() >= {"step", "position", "head_steps", "num_classes"}:
            raise UsageError(f"{path} is damaged: counters are missing; take another checkpoint")
        return state

    def shapes(self) -> Mapping[str, TensorStorageMetadata]:
        """Name → size and dtype of every tensor in it."""
        entries = _read_metadata(self.path).state_dict_metadata
        return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    @property
    def written(self) -> tuple[float, int]:
        """To sort by: when it was written, as after a return to an earlier step a lower one is the later; its step."""
        return float(self.state().get("written", 0)), self.step


def load(found: Found, tensors: dict[str, Tensor], prefixes: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Reads tensors in place; each rank gets its part of the DTensors, however many ranks wrote them.

    Args:
        tensors: where to; their names and shapes must be in the checkpoint.
        prefixes: further tensors to read, all whose names begin so.

    Returns:
        The further tensors.

    Raises:
        UsageError: the files are damaged, or hold what is no tensor.
    """
    further = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.shapes().items()
        if name.startswith(prefixes) and name not in tensors
    }
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            # Reading without a process group is what `pfc evaluate` means to do.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({**tensors, **further}, storage_reader=_Reader(found.path), no_dist=alone)
    except CheckpointException as error:
        raise _unreadable(found.path, next(iter(error.failures.values()))[0]) from None
    return further


def read_pieces(found: Found, name: str) -> Iterator[tuple[int, Tensor]]:
    """The pieces of a sharded tensor as they were written, (first row, [rows, ...]), one at a time in memory.

    Raises:
        UsageError: the files are damaged, or hold what is no tensor.
    """
    for index, place in _read_metadata(found.path).storage_data.items():
        if index.fqn != name:
            continue
        path = found.path / place.relative_path
        with path.open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
        try:
            rows = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # damaged in one of many ways, or not weights only
            raise _unreadable(path, error) from None
        yield (index.offset[0] if index.offset else 0), rows


BACKBONE, AVERAGE = "backbone/", "ema/"


def network_tensors(network: nn.Module, prefix: str = BACKBONE) -> dict[str, Tensor]:
    """The weights and buffers under the names that they have in a checkpoint; of their average with ``AVERAGE``."""
    return {f"{prefix}{name}": value for name, value in network.state_dict().items()}


def _unreadable(path: Path, error: BaseException) -> Exception:
    if isinstance(error, UsageError):
        return UsageError(str(error))
    reason = " ".join(str(error).split(". ")[0].split()) or type(error).__name__
    return UsageError(f"{path} cannot be read: {reason[:200]}; no code in a file is run; take another checkpoint")


class _Reader(FileSystemReader):
    """torch's reader of a checkpoint's files, with the table read so that nothing in it runs."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def _read_metadata(checkpoint: Path) -> Metadata:
    """The table of the checkpoint's tensors, checked against its files.

    Raises:
        UsageError: it asks for anything else, or does not fit the files.
    """
    path = checkpoint / METADATA
    try:
        with path.open("rb") as file:
            content = _Unpickler(file).load()
        metadata = _metadata(content)
    except FileNotFoundError:
        raise UsageError(f"{checkpoint} is not complete: {METADATA} is missing; take another checkpoint") from None
    except _RefusedError as refused:
        raise UsageError(
            f"{path} is refused: it holds {refused}, and a checkpoint's table holds names and sizes of tensors alone; "
            "no code in a pickle is run"
        ) from None
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{path} is damaged ({reason[:100]}); take another checkpoint") from None
    _check_files(checkpoint, metadata)
    return metadata


class _RefusedError(Exception):
    """What a table holds that is none of its business."""


class _StandIn:
    """In the place of an object: what it was made from, and nothing that acts."""

    made_from: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *arguments: Any) -> "_StandIn":
        made = super().__new__(cls)
        made.made_from = arguments
        return made

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if f"{module}.{name}" not in _KNOWN:
            raise _RefusedError(f"{module}.{name}")
        return type(name, (_StandIn,), {})


def _fields(value: Any, kind: str, of: type = dict) -> Any:
    if not isinstance(value, _StandIn) or _name(value) != kind or not isinstance(value.state, of):
        raise _RefusedError(f"{_name(value)} where {kind} belongs")
    return value.state


def _name(value: Any) -> str:
    return type(value).__name__


def _size(value: Any) -> torch.Size:
    numbers = value.made_from[0] if isinstance(value, _StandIn) and _name(value) == "Size" else None
    if not isinstance(numbers, tuple) or not all(type(number) is int and number >= 0 for number in numbers):
        raise _RefusedError(f"{_name(value)} where a size belongs")
    return torch.Size(numbers)


def _metadata(content: Any) -> Metadata:
    table = _fields(content, "Metadata")
    entries, places = table["state_dict_metadata"], table["storage_data"]
    return Metadata(
        state_dict_metadata={str(name): _entry(entry) for name, entry in entries.items()},
        planner_data={str(name): (str(name),) for name in entries},
        storage_data={_index(index): _place(place) for index, place in places.items()},
    )


def _entry(value: Any) -> TensorStorageMetadata:
    entry = _fields(value, "TensorStorageMetadata")
    dtype, *_ = _fields(entry["properties"], "TensorProperties", tuple)
    if not isinstance(dtype, torch.dtype):
        raise _RefusedError(f"{_name(dtype)} where a dtype belongs")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in entry["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        _size(entry["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _index(value: Any) -> MetadataIndex:
    index = _fields(value, "MetadataIndex")
    offset, place = index.get("offset"), index.get("index")
    return MetadataIndex(
        str(index["fqn"]), None if offset is None else _size(offset), place if isinstance(place, int) else None
    )


def _place(value: Any) -> _StorageInfo:
    place = _fields(value, "_StorageInfo")
    name, offset, length = place["relative_path"], place["offset"], place["length"]
    if not isinstance(name, str) or PurePath(name).name != name or "\0" in name:
        raise _RefusedError(f"the file name {name!r}, which leaves the checkpoint's directory")
    if place.get("transform_descriptors"):
        raise _RefusedError("a transformed file")
    if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
        raise _RefusedError(f"a place {offset!r}, {length!r}")
    return _StorageInfo(name, offset, length)


def _check_files(checkpoint: Path, metadata: Metadata) -> None:
    """That every file is as long as the table says; so a copy that was cut short is found before training."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found is None or found < end:
            told = "is missing" if found is None else f"has {found:,} bytes of {end:,}"
            raise UsageError(f"{path} {told}: the checkpoint is damaged; copy it again, or take another one")
