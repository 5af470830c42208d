"""Packing itself, the same for every source: choose, shuffle, read in several processes, write, go on after a stop."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from ..errors import UsageError
from ..records.manifest import printable
from ..records.recordio import TooLargeError, cut_back
from ..workers import WorkerDied, end_unguarded_worker, parallel_map
from .options import PackOptions
from .resume import StoppedPacking
from .selection import Selection, select
from .sources.base import Source
from .storing import Storing
from .summary import SKIPPED_NAME, PackSummary
from .writer import FULL, ShardedWriter, check_output

SAVE_EVERY = 10.0  # seconds of work that an interruption may cost
_HOPELESS = 1000  # so many unreadable images and no readable one: something is wrong with the source as a whole


def check_apart(out: Path, sources: list[Path], options: PackOptions) -> None:
    """UsageError where ``out`` cannot be written, or lies in a source, or a source in it."""
    end_unguarded_worker()
    check_output(out, overwrite=options.overwrite)
    there = out.resolve()
    for source in sources:
        here = source.resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise UsageError(f"{out} and the source {source} lie one in the other: give a place outside")


def pack(source: Source, out: Path, options: PackOptions) -> PackSummary:
    """Pack ``source`` into a data set at ``out``; UsageError where the options do not fit it, or nothing can be read.

    An image that cannot be read is named in the summary and in ``out``/skipped.tsv.
    """
    if options.strict and source.rejected:
        raise UsageError(f"{printable(': '.join(source.rejected[0]))} (packing is strict)")
    store = options.storing()
    chosen = select(source, options)
    shards = _count_shards(len(chosen.images), options)
    creation = store.to_dict() | {"shards": shards, "seed": options.seed} | _unusual(options)
    if source.landmarks is not None:
        creation["align"] = True
    writer = ShardedWriter(
        out,
        identities=chosen.identities if chosen.names is None else chosen.names,
        image_size=source.image_size if store.keep_bytes else store.size,
        source=source.about,
        name=options.name,
        creation=creation,
        shards=shards,
        overwrite=options.overwrite,
        resume_key=_key(source, store, chosen, creation | {"name": options.name}),
    )
    try:
        with writer:
            resumed_at, skipped = _write(writer, source, store, chosen, options)
            _write_skipped(writer.folder, source, skipped)
    except (MemoryError, WorkerDied) as error:
        why = error if isinstance(error, WorkerDied) else "not enough memory: use fewer workers"
        raise StoppedPacking(f"packing into {out} stopped: {why}; the command then goes on where it stopped") from None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        what = f"{out} cannot be written: {why}; free some space, then"
        if error.errno not in FULL:
            at = f" at {error.filename}" if error.filename else ""
            what = printable(f"packing into {out} stopped{at}: {why}; when that is fixed,")
        raise StoppedPacking(f"{what} the same command goes on where it stopped") from None
    return _summary(writer, source, chosen, skipped, resumed_at)


def _write(
    writer: ShardedWriter, source: Source, store: Storing, chosen: Selection, options: PackOptions
) -> tuple[int, list[tuple[int, str]]]:
    """Write all images; gives how many were done before, and those left out as (place in the source, reason)."""
    assert writer.partial is not None
    source.prepare(writer.partial.temporary)
    order = chosen.images
    if options.shuffle:
        order = np.random.default_rng(options.seed).permutation(order)
    resumed = writer.resumed or {"done": 0, "skipped_bytes": 0}
    start: int = resumed["done"]
    ahead, along = tee(_with_labels(order[start:], source.codes, chosen.labels))
    tasks = (source.task(image, label) for image, label in ahead)
    reader = source.reader(store, chosen.identities, shuffled=options.shuffle)
    results = parallel_map(reader, tasks, workers=options.workers)
    with _SkipLog(writer.partial.skipped, resumed["skipped_bytes"]) as skipped:
        saved = time.monotonic()
        for done, ((image, label), result) in enumerate(zip(along, results, strict=True), start=start + 1):
            reason = result if isinstance(result, str) else None
            try:
                if isinstance(result, bytes):
                    writer.write_record(result) if source.whole_records else writer.write(label, result)
            except TooLargeError as error:
                reason = str(error)
            if reason is not None:
                skipped.append(image, reason)
                if options.strict:
                    raise StoppedPacking(f"{printable(source.describe(image))}: {reason} (packing is strict)")
                if not writer.images and done == _HOPELESS:
                    break
            if options.progress is not None and (done % 64 == 0 or done == len(order)):
                options.progress(done, len(order))
            if time.monotonic() - saved >= SAVE_EVERY:
                writer.save({"done": done, "skipped_bytes": skipped.sync()})
                saved = time.monotonic()
        if not writer.images:
            tried = f"its {len(order):,}" if len(skipped.entries) == len(order) else f"the first {_HOPELESS:,}"
            image, reason = skipped.entries[0]
            example = printable(source.describe(image))
            raise UsageError(f"{source.about}: none of {tried} images can be read, e.g. {example}: {reason}")
        writer.save({"done": len(order), "skipped_bytes": skipped.sync()})
        return start, skipped.entries


def _with_labels(images: np.ndarray, codes: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, int]]:
    """(image, its label): ``images`` int [n], ``codes`` of all images, ``labels`` of the codes."""
    for start in range(0, len(images), 4096):
        block = images[start : start + 4096]
        yield from zip(block.tolist(), labels[codes[block]].tolist(), strict=True)


def _write_skipped(folder: Path, source: Source, skipped: list[tuple[int, str]]) -> None:
    lines = [f"{image}\t{reason}\n" for image, reason in _all_skipped(source, skipped)]
    if lines:
        (folder / SKIPPED_NAME).write_text(printable("".join(lines)), encoding="utf-8")


def _all_skipped(source: Source, skipped: list[tuple[int, str]]) -> list[tuple[str, str]]:
    return sorted([*source.rejected, *((source.describe(image), reason) for image, reason in skipped)])


def _summary(
    writer: ShardedWriter,
    source: Source,
    chosen: Selection,
    skipped: list[tuple[int, str]],
    resumed_at: int,
) -> PackSummary:
    left = np.bincount(source.codes[chosen.images], minlength=len(source.names))
    np.subtract.at(left, source.codes[[image for image, _ in skipped]], 1)
    empty = np.flatnonzero((chosen.labels >= 0) & (left == 0))
    return PackSummary(
        path=writer.out,
        images=writer.images,
        identities=writer.identities,
        shards=writer.shards,
        bytes=writer.bytes,
        skipped=_all_skipped(source, skipped),
        ignored_files=source.ignored_files,
        empty_identities=[source.names[code] for code in empty.tolist()],
        dropped_identities=chosen.dropped_identities,
        dropped_images=chosen.dropped_images,
        resumed_at=resumed_at,
    )


def _count_shards(images: int, options: PackOptions) -> int:
    if options.images_per_shard is None:
        if options.shards > images:
            raise UsageError(f"{options.shards} shards for {images} images: ask for {images} shards or fewer")
        return options.shards
    if options.images_per_shard < 1:
        raise UsageError(f"{options.images_per_shard} images a shard: it takes at least 1")
    if options.shards != 1:
        raise UsageError("the number of shards and the number of images a shard exclude each other: give one of them")
    return -(-images // options.images_per_shard)


def _unusual(options: PackOptions) -> dict[str, Any]:
    """Choices for dataset.json that are seldom made."""
    made = {
        "min_images": options.min_images if options.min_images > 1 else None,
        "only": options.only and printable(str(options.only)),
        "without": options.without and printable(str(options.without)),
        "without_images": options.without_images and printable(str(options.without_images)),
        "keep_labels": options.keep_labels or None,
        "shuffle": None if options.shuffle else False,
    }
    return {name: value for name, value in made.items() if value is not None}


def _key(source: Source, store: Storing, chosen: Selection, creation: dict[str, Any]) -> str:
    """A digest of all that decides about the bytes of the result, but the content of the images."""
    digest = hashlib.sha256()
    versions = [version("pfc"), PIL.__version__, np.__version__, store.check]  # numpy's shuffle may change
    digest.update(json.dumps([creation, versions]).encode())
    digest.update(chosen.labels.tobytes())
    digest.update(chosen.images.tobytes())
    for part in source.content():
        digest.update(part)
    return digest.hexdigest()


class _SkipLog:
    """Images that could not be read, stored on the disk together with what is written."""

    def __init__(self, path: Path, size: int) -> None:
        self.entries: list[tuple[int, str]] = []
        self._file = path.open("a+b")
        cut_back(self._file, path, size)
        self._file.seek(0)
        for line in self._file.read().decode().split("\n")[:-1]:
            image, reason = line.split("\t", 1)
            self.entries.append((int(image), reason))

    def append(self, image: int, reason: str) -> None:
        self.entries.append((image, reason))
        self._file.write(f"{image}\t{printable(reason)}\n".encode())

    def sync(self) -> int:
        """Bring all entries to the disk; their size there, for the constructor."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> _SkipLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
