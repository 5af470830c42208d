"""Walks every record of a data set and says what is in it, and what is wrong with it."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
from PIL import Image

from ..errors import DamagedRecord
from ..images import why_unreadable
from ..loading.headers import header_problem
from ..packing.writer import check_output
from ..records.dataset import RecordDataset
from ..workers import Progress, parallel_map
from .repair import write_repaired

_CHUNK = 512  # images that a worker checks in one go


class Damage(NamedTuple):
    """One thing that is wrong. ``key`` and ``offset`` (bytes) are None where it concerns the whole file."""

    file: str
    key: int | None
    offset: int | None
    what: str

    def __str__(self) -> str:
        place = "" if self.offset is None else f" key {self.key} at byte {self.offset}:"
        return f"{self.file}:{place} {self.what}"


@dataclass(frozen=True)
class InspectReport:
    """What ``inspect_dataset`` found; ``to_dict`` and ``to_json`` give it all."""

    path: str
    name: str
    images: int  # good ones
    identities: int
    shards: int
    bytes: int  # of all .rec files
    skipped: int  # records that give no image: the next three together
    header_records: int
    identity_records: int
    damaged: int
    label_encoding: str
    image_size: tuple[int, int] | None  # (height, width) that the data set promises
    image_sizes: dict[str, int]  # "heightxwidth" → good images, the most frequent ten
    images_per_identity: dict[str, float]  # min, median, max over the identities that have a good image
    identities_without_images: int
    decoded: bool
    checksums: str  # "ok", "wrong", "skipped", "none"
    errors_found: int  # all that is wrong, listed or not
    repaired: str | None = None  # where the good images were copied to
    errors: list[Damage] = field(default_factory=list)  # files, then records in their order; the first max_errors

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors_found

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"errors": [error._asdict() for error in self.errors], "ok": self.ok}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        spread = self.images_per_identity
        lines = [
            f"{self.name}: {self.images:,} images of {self.identities:,} identities "
            f"in {self.shards} shard(s), {self.bytes / 1e6:,.1f} MB: {self.path}",
            f"images per identity: {spread['min']:g} to {spread['max']:g}, median {spread['median']:g}; "
            f"{self.identities_without_images:,} identities without images",
            "image sizes: " + (", ".join(f"{size} ({n:,})" for size, n in self.image_sizes.items()) or "none"),
            f"labels: {self.label_encoding}; checksums: {self.checksums}; "
            f"images {'decoded in full' if self.decoded else 'not decoded, only their headers read'}",
            f"skipped {self.skipped:,} records: {self.header_records} header, "
            f"{self.identity_records:,} identity, {self.damaged:,} damaged",
        ]
        lines += [f"  {error}" for error in self.errors]
        if len(self.errors) < self.errors_found:
            lines.append(f"  and {self.errors_found - len(self.errors):,} more (see --limit)")
        lines.append("all good" if self.ok else "damaged")
        if self.repaired is not None:
            lines.append(f"wrote the {self.images:,} good images to {self.repaired}")
        return "\n".join(lines)


def inspect_dataset(
    path: str | Path,
    *,
    decode: bool = True,
    checksums: bool = True,
    workers: int | None = None,
    max_errors: int = 1000,
    repair: str | Path | None = None,
    progress: Progress | None = None,
) -> InspectReport:
    """Check every record of the data set at ``path``: framing, labels, images; and the shards' checksums.

    decode: decode every image in full; otherwise only its own header is read. checksums: compare the ``.rec``
    files with the sha256 in dataset.json. At most ``max_errors`` errors are listed, all are counted. repair:
    a new or empty directory to which the good images are copied as a data set (``repair.write_repaired``).
    progress counts images. UsageError where the data set cannot be opened at all: a file is missing, or an index
    is invalid.
    """
    if repair is not None:
        check_output(Path(repair), overwrite=None)
    dataset = RecordDataset.open(path, strict=False)
    total = len(dataset)
    starts = range(0, total, _CHUNK)
    run = uuid4().hex
    tasks = ((run, str(path), start, min(start + _CHUNK, total), decode) for start in starts)
    errors: list[Damage] = []
    bad: list[int] = []
    sizes: Counter[str] = Counter()
    covered: Counter[str] = Counter()
    labels: list[np.ndarray] = []
    # A small set is not worth starting processes for.
    results = parallel_map(_check, tasks, workers=1 if total < 20 * _CHUNK else workers, chunk=1)
    for start, result in zip(starts, results, strict=True):
        bad += result.errors
        errors += itertools.islice(result.errors.values(), max(0, max_errors - len(errors)))
        sizes.update(result.sizes)
        covered.update(result.covered)
        labels.append(result.labels)
        if progress is not None:
            progress(min(start + _CHUNK, total), total)

    others = list(_check_other_records(dataset, covered))
    whole_files = list(_wrong_files(dataset, None if bad or others else covered))
    wrong_sums = list(_wrong_checksums(dataset)) if checksums else []
    verdict = "wrong" if wrong_sums else "ok"
    if not checksums or dataset.manifest is None:
        verdict = "skipped" if dataset.manifest else "none"
    good = np.concatenate([*labels, np.empty(0, dtype=np.int64)])
    present, counts = np.unique(good, return_counts=True)
    counts = counts if len(counts) else np.zeros(1, dtype=np.int64)
    declared = dataset.told_classes
    identities = declared if declared is not None else int(present.max(initial=-1)) + 1
    if repair is not None:
        promised = dataset.image_size
        same = promised is not None and list(sizes) == [f"{promised[0]}x{promised[1]}"]
        write_repaired(
            dataset, Path(repair), bad, identities=identities, image_size=promised if same else None, progress=progress
        )
    headers = sum(shard.header is not None for shard in dataset.shards)
    identity_records = sum(shard.identity_records for shard in dataset.shards)
    return InspectReport(
        path=str(path),
        name=dataset.name,
        images=len(good),
        identities=identities,
        shards=len(dataset.shards),
        bytes=sum(shard.file.size for shard in dataset.shards),
        skipped=headers + identity_records + len(bad),
        header_records=headers,
        identity_records=identity_records,
        damaged=len(bad),
        label_encoding=dataset.label_encoding,
        image_size=dataset.image_size,
        image_sizes=dict(sizes.most_common(10)),
        images_per_identity={
            "min": int(counts.min()),
            "median": float(np.median(counts)),
            "max": int(counts.max()),
        },
        identities_without_images=identities - len(present),
        decoded=decode,
        checksums=verdict,
        repaired=None if repair is None else str(repair),
        errors_found=len(whole_files) + len(wrong_sums) + len(others) + len(bad),
        errors=(whole_files + wrong_sums + others + errors)[:max_errors],
    )


class _Checked(NamedTuple):
    errors: dict[int, Damage]  # by the image's number
    sizes: Counter[str]
    covered: Counter[str]  # bytes of good records, by shard
    labels: np.ndarray  # int64, of the good images


@lru_cache(maxsize=1)
def _open(run: str, path: str) -> RecordDataset:
    """Once in each worker process; ``run``, new each time, keeps a later call from seeing old files."""
    return RecordDataset.open(path, strict=False)


def _check(task: tuple[str, str, int, int, bool]) -> _Checked:
    run, path, start, stop, decode = task
    dataset = _open(run, path)
    errors: dict[int, Damage] = {}
    sizes: Counter[str] = Counter()
    covered: Counter[str] = Counter()
    labels: list[int] = []
    for index in range(start, stop):
        try:
            label, image = dataset.read(index)
            sizes[_check_image(dataset, index, image, decode)] += 1
            labels.append(label)
            shard, position = dataset.locate(index)
            covered[str(shard.file.path)] += shard.length(position)
        except DamagedRecord as error:
            errors[index] = _damage(error)
    return _Checked(errors, sizes, covered, np.array(labels, dtype=np.int64))


def _damage(error: DamagedRecord) -> Damage:
    return Damage(str(error.shard), error.key, error.offset, error.reason)


def _check_other_records(dataset: RecordDataset, covered: Counter[str]) -> Iterator[Damage]:
    """What is wrong with header and identity records; adds the bytes of the good ones to ``covered``."""
    for shard in dataset.shards:
        for position in itertools.chain(range(shard.first), range(shard.first + shard.images, len(shard.keys))):
            try:
                shard.read_record(position)
                covered[str(shard.file.path)] += shard.length(position)
            except DamagedRecord as error:
                yield _damage(error)


def _wrong_files(dataset: RecordDataset, covered: Counter[str] | None) -> Iterator[Damage]:
    """Files of another size than dataset.json says; with ``covered``, where all is good, records not listed."""
    entries = {} if dataset.manifest is None else {entry.rec: entry for entry in dataset.manifest.shards}
    for shard in dataset.shards:
        path, entry = shard.file.path, entries.get(shard.file.path.name)
        if entry is not None and shard.file.size != entry.bytes:
            yield Damage(str(path), None, None, f"has {shard.file.size} bytes, {entry.bytes} by dataset.json")
            continue
        if entry is not None and len(shard.keys) != entry.images:
            what = f"its index lists {len(shard.keys)} records, {entry.images} by dataset.json"
        elif covered is not None and covered[str(path)] < shard.file.size:
            what = f"its index leaves out {shard.file.size - covered[str(path)]} of its {shard.file.size} bytes"
        else:
            continue
        yield Damage(str(path), None, None, f"{what}: rebuild it with --rebuild-index --force")


def _check_image(dataset: RecordDataset, index: int, image: np.ndarray, decode: bool) -> str:
    """The image's size, "heightxwidth"; DamagedRecord where it cannot be decoded or is of another size."""
    shard, position = dataset.locate(index)
    if (problem := header_problem(image)) is not None:  # DALI refuses more than Pillow
        raise shard.error(position, f"its image cannot be decoded: {problem}")
    try:
        with Image.open(io.BytesIO(image.tobytes())) as picture:
            width, height = picture.size
            if decode:
                picture.load()
    except Exception as error:  # Pillow's decoders raise nearly anything about a damaged image
        raise shard.error(position, f"its image cannot be decoded: {why_unreadable(error)}") from None
    if dataset.image_size not in (None, (height, width)) and dataset.manifest is not None:
        raise shard.error(position, f"its image is {height}x{width}, the data set's are {dataset.image_size}")
    return f"{height}x{width}"


def _wrong_checksums(dataset: RecordDataset) -> Iterator[Damage]:
    if dataset.manifest is None:
        return
    sums = {entry.rec: entry.sha256 for entry in dataset.manifest.shards}
    for shard in dataset.shards:
        digest = hashlib.sha256()
        for piece in shard.file.content():
            digest.update(piece)
        found = digest.hexdigest()
        expected = sums[shard.file.path.name]
        if found != expected:
            what = f"sha256 is {found[:12]}…, {expected[:12]}… by dataset.json: the file was changed"
            yield Damage(str(shard.file.path), None, None, what)
