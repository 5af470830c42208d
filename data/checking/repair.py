"""Writes what is good in a damaged data set as a data set of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import unfinished_name
from ..errors import UsageError
from ..packing.writer import entry_of
from ..records.dataset import RecordDataset
from ..records.index import Shard
from ..records.manifest import LABEL_NAMES_NAME, Manifest, ShardEntry
from ..records.recordio import RecordWriter
from ..workers import Progress


def write_repaired(
    dataset: RecordDataset,
    out: Path,
    bad: Sequence[int],
    *,
    identities: int,
    image_size: tuple[int, int] | None,
    progress: Progress | None = None,
) -> None:
    """Copy all images of ``dataset`` but ``bad`` (their numbers) to ``out``, which must be new or empty.

    The same shards with the same records, byte for byte, under the same keys and in the same order on disk; header and
    identity records, whose counts would be wrong, are left out, and so is a shard without a good image. Written under
    a temporary name and renamed when complete. progress counts images.
    """
    place = out.resolve()
    unfinished = unfinished_name(place)
    left_out = np.zeros(len(dataset), dtype=bool)
    left_out[list(bad)] = True
    if left_out.all():
        raise UsageError(f"{dataset.path}: not one image is good, so there is nothing to save")
    entries: list[ShardEntry] = []
    done = 0
    try:
        unfinished.mkdir(parents=True)
        for shard in dataset.shards:
            good = np.flatnonzero(~left_out[done : done + shard.images]) + shard.first
            if len(good):
                entries.append(_copy_shard(shard, good, unfinished))
            done += shard.images
            if progress is not None:
                progress(done, len(dataset))
        _write_about(dataset, unfinished, entries, identities, image_size)
        os.replace(unfinished, place)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _copy_shard(shard: Shard, good: np.ndarray, folder: Path) -> ShardEntry:
    good = good[np.argsort(shard.offsets[good], kind="stable")]
    with RecordWriter(folder / shard.file.path.name) as writer:
        for position in map(int, good):
            writer.write(int(shard.keys[position]), shard.read_payload(position).tobytes())
    return entry_of(writer)


def _write_about(
    dataset: RecordDataset,
    folder: Path,
    entries: list[ShardEntry],
    identities: int,
    image_size: tuple[int, int] | None,
) -> None:
    old = dataset.manifest
    images = sum(entry.images for entry in entries)
    changed: dict[str, Any] = {"images": images, "shards": tuple(entries), "pfc": version("pfc")}
    if old is not None:
        manifest = old.model_copy(update=changed)
    else:
        manifest = Manifest(
            name=dataset.name,
            identities=identities,
            image_size=image_size,
            label_encoding=dataset.label_encoding,
            source=str(dataset.path.resolve()),
            creation={"repaired": True},
            **changed,
        )
    manifest.write(folder)
    for name in ("property", LABEL_NAMES_NAME):
        if (dataset.folder / name).is_file():
            shutil.copyfile(dataset.folder / name, folder / name)
