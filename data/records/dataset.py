"""A data set of encoded images and labels in RecordIO shards."""

from __future__ import annotations

import json
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from ..atomic import replaced_of
from ..errors import UsageError
from ..remote.mirror import RemoteOptions, address_of, mirrored
from ..workers import Progress
from .all_labels import ShardLabels
from .index import Shard, open_shard
from .labels import FLOAT32_EXACT, LabelEncoding
from .manifest import LABEL_NAMES_NAME, Manifest, read_manifest
from .mapped import with_descriptors


class RecordDataset:
    """Images and labels of one or many ``.rec`` files; ``open`` makes one.

    Image i counts from 0 over all shards, in the order of their names and of the keys in each; header and
    identity records are no images. Reading is thread-safe.

    Attributes: ``path``; ``name``; ``image_size`` (height, width), None where the data set does not say;
    ``manifest``, what ``dataset.json`` says, None where there is none; ``told_classes``, how many identities
    the data set says it has, None where only the labels can tell; ``label_encoding``; ``shards``, and
    ``shard_labels``, which decodes their labels.
    """

    def __init__(
        self,
        path: Path,
        shards: list[Shard],
        *,
        name: str,
        num_classes: int | None = None,
        image_size: tuple[int, int] | None = None,
        label_encoding: LabelEncoding = "float32",
        manifest: Manifest | None = None,
    ) -> None:
        self.path = path
        self.shards = shards
        self.name = name
        self.image_size = image_size
        self.label_encoding: LabelEncoding = label_encoding
        self.manifest = manifest
        self.told_classes = num_classes
        self.shard_labels = ShardLabels(path, shards, label_encoding, num_classes)
        self._starts = [0, *accumulate(shard.images for shard in shards)]

    @staticmethod
    @with_descriptors
    def open(path: str | Path, *, strict: bool = True, remote: RemoteOptions | None = None) -> RecordDataset:
        """Open a directory of shards, by pfc or by the tools of MXNet or InsightFace, or one ``.rec``.

        An address such as s3://bucket/folder is opened through a local folder, which keeps what was read of it:
        ``remote`` says how, see ``RemoteOptions``.

        Cheap: the ``.rec`` files are mapped into memory, only the ``.idx`` files are read, and a large one only
        once (see ``index.load_index``). UsageError where something is missing, or the files do not belong together.
        A ``.rec`` that was cut short opens, as long as most of it is there: its lost records are damaged ones. Not
        ``strict``: the same however much of it is lost. No file stays open: there may be any number of shards.
        """
        address = address_of(path)
        path = Path(path) if address is None else mirrored(address, remote)
        if path.is_dir():
            folder, recs = path, sorted(path.glob("[!.]*.rec"))  # not the ._NAME.rec that macOS leaves
        elif path.suffix == ".rec" and path.is_file():
            folder, recs = path.parent, [path]
        elif path.exists():
            raise UsageError(f"{path} is neither a directory nor a .rec file: give the directory that holds the shards")
        elif replaced_of(path).exists():
            raise UsageError(
                f"{path}: this data set was to be replaced, and that was interrupted: give the command that packs it "
                f"again, or take the old one, {replaced_of(path)}"
            )
        else:
            raise UsageError(f"{path}: no such data set; check the path")

        manifest = read_manifest(folder)
        entries = {} if manifest is None else {folder / entry.rec: entry for entry in manifest.shards}
        if path.is_dir() and entries:
            recs = list(entries)
        if not recs:
            raise UsageError(f"{path} holds no .rec file: pack images with 'pfc pack', or give the shards' directory")

        if manifest is None or not entries.keys() >= set(recs):
            shards = [open_shard(rec, rec.with_suffix(".idx"), strict=strict) for rec in recs]
            classes, image_size = _read_property(folder)
            identities = max((_header_identities(shard) for shard in shards), default=0)
            return RecordDataset(
                path,
                shards,
                name=folder.resolve().name if path.is_dir() else path.stem,
                num_classes=classes or identities or None,
                image_size=image_size,
            )

        shards = []
        for rec in recs:
            entry = entries[rec]
            shard = open_shard(rec, folder / entry.idx, strict=strict)
            if strict and shard.file.size > entry.bytes:
                raise UsageError(
                    f"{rec} has {shard.file.size} bytes, {entry.bytes} by its dataset.json: changed; "
                    f"copy or pack it again, or save what is good: pfc inspect {folder} --repair OUT"
                )
            # An index rebuilt from a truncated file cannot list the lost records.
            if strict and len(shard.keys) != entry.images and shard.file.size == entry.bytes:
                raise UsageError(
                    f"{folder / entry.idx} lists {len(shard.keys)} records, {entry.images} by its dataset.json; "
                    f"bring the .idx that was written with {rec.name}"
                )
            shards.append(shard)
        return RecordDataset(
            path,
            shards,
            name=manifest.name,
            num_classes=manifest.identities,
            image_size=manifest.image_size,
            label_encoding=manifest.label_encoding,
            manifest=manifest,
        )

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def folder(self) -> Path:
        """The directory that holds the shards."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def num_classes(self) -> int:
        """How many identities there are: labels are 0 … num_classes − 1.

        By dataset.json, the ``property`` file or the header record, whichever comes first; else the largest
        label plus one, for which every image's label is read once; damaged records do not count.
        """
        if self.told_classes is not None:
            return self.told_classes
        return max(1, int(self.labels(damaged=-1).max()) + 1)

    def read(self, index: int) -> tuple[int, np.ndarray]:
        """Label and encoded image (uint8 [bytes], read-only) of image ``index``.

        DamagedRecord (a UsageError) with file, key and offset if the record is damaged or its label is not
        in 0 … num_classes − 1. IndexError where index is not in [0, len).
        """
        shard, position = self.locate(index)
        record = shard.read_image(position)
        return self.shard_labels.decode(record, shard, position), record.image

    def label(self, index: int) -> int:
        """The label of image ``index``; errors as ``read``."""
        return self.read(index)[0]

    def labels(self, *, damaged: Literal[-1] | None = None, progress: Progress | None = None) -> np.ndarray:
        """All labels [len], read-only: int32, or int64 where there are identities from 2³¹ on.

        Reads the first bytes of every record (progress counts them), and of a large data set only once: the labels
        are then cached next to it and mapped from there as long as its files do not change. DamagedRecord at the first
        record whose label cannot be read; or, with ``damaged=-1``, that number in its place.
        """
        labels = self.shard_labels.all(progress)
        if damaged is None and labels.min(initial=0) < 0:
            self.read(int(np.argmin(labels)))  # raises what is wrong with it
        return labels

    def locate(self, index: int) -> tuple[Shard, int]:
        """The shard that holds image ``index``, and its record's position there."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        at = bisect_right(self._starts, index) - 1
        shard = self.shards[at]
        return shard, shard.first + index - self._starts[at]

    def identity_names(self) -> list[str] | None:
        """The name of each label's identity, as ``pfc pack`` saved them; None where it did not."""
        path = self.folder / LABEL_NAMES_NAME
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{path} is damaged: {error}; bring the one that was written with the shards") from None


def _header_identities(shard: Shard) -> int:
    """Identities by the header record, where it agrees with the identity records; else 0.

    Its float32 count is exact up to 2²⁴ records; beyond, the identity records are counted.
    """
    if shard.header is None or shard.header.flag < 2:
        return 0
    first, stop = shard.header.labels[:2]
    return shard.identity_records if stop >= FLOAT32_EXACT or stop - first == shard.identity_records else 0


def _read_property(folder: Path) -> tuple[int | None, tuple[int, int] | None]:
    """Identities and (height, width) by InsightFace's ``property`` file."""
    path = folder / "property"
    if not path.is_file():
        return None, None
    try:
        classes, height, width = map(int, path.read_text(encoding="utf-8").strip().split(","))
        if min(classes, height, width) < 0:
            raise ValueError
    except ValueError:
        raise UsageError(f"{path} should be one line 'num_classes,height,width': correct or remove it") from None
    return classes, (height, width)
