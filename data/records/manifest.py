"""``dataset.json``: what a packed data set says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import UsageError
from .labels import LabelEncoding

MANIFEST_NAME = "dataset.json"
LABEL_NAMES_NAME = "labels.json"


class ShardEntry(BaseModel):
    """One ``.rec``/``.idx`` pair; ``bytes`` and ``sha256`` are those of the ``.rec``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rec: str
    idx: str
    images: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str

    @field_validator("rec", "idx")
    @classmethod
    def _beside(cls, name: str) -> str:
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"{name!r} is not the name of a file beside it")
        return name


class Manifest(BaseModel):
    """The fields of ``dataset.json``, in the order in which they are written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1  # version of this layout
    name: str
    images: int = Field(ge=1)
    identities: int = Field(ge=1)  # labels are 0 … identities − 1
    image_size: tuple[int, int] | None  # (height, width) of every image; null: the images have sizes of their own
    label_encoding: LabelEncoding
    source: str  # what the images were made from
    creation: dict[str, Any]  # parameters that made them
    shards: tuple[ShardEntry, ...] = Field(min_length=1)
    pfc: str  # version that wrote the data set

    def write(self, folder: Path) -> None:
        (folder / MANIFEST_NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def printable(text: str) -> str:
    """``text`` with the bytes of file names that are no UTF-8 as backslash escapes, so that it can be written."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of the data set in ``folder``, None where it has none; UsageError where it is not valid."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(f"{path}: {place}: {first['msg']}; restore the file, or pack the data set again") from None
    together = sum(shard.images for shard in manifest.shards)
    if together != manifest.images:
        raise UsageError(
            f"{path}: says {manifest.images} images, its shards together {together}; "
            "restore the file, or pack the data set again"
        )
    return manifest
