"""Reading the table of a checkpoint, ``.metadata``, which torch writes as a pickle: none of what it names is called.

Inert stand-ins take the places of all objects, new ones at every name; then torch's own objects are made from what
they hold, after a look at every part: names of files that stay in the directory, tensors and nothing but tensors (an
entry of another kind would be unpickled by torch).
"""

import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
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

NAME = ".metadata"
_DCP = "torch.distributed.checkpoint"
_KNOWN = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")),
    *((f"{_DCP}.metadata", name) for name in ("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}


class Reader(FileSystemReader):
    """torch's reader of a checkpoint's files, with the table read so that nothing in it runs.

    Raises, when it reads: UsageError, in one line, where the table asks for anything else or does not fit the files.
    The tensors themselves torch loads as weights only.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def read_metadata(checkpoint: Path) -> Metadata:
    """The table of the checkpoint's tensors, checked against its files; see ``Reader``."""
    path = checkpoint / NAME
    try:
        with path.open("rb") as file:
            content = _Unpickler(file).load()
        metadata = _metadata(content)
    except FileNotFoundError:
        raise UsageError(f"{checkpoint} is not complete: {NAME} is missing; take another checkpoint") from None
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
        if (module, name) not in _KNOWN:
            raise _RefusedError(f"{module}.{name}")
        return type(name, (_StandIn,), {})


def _fields(value: Any, kind: str) -> dict[str, Any]:
    if not isinstance(value, _StandIn) or type(value).__name__ != kind or not isinstance(value.state, dict):
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
    properties = entry["properties"]
    if not isinstance(properties, _StandIn) or _name(properties) != "TensorProperties":
        raise _RefusedError(f"{_name(properties)} where TensorProperties belongs")
    dtype = properties.state[0]
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
