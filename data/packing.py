"""Packs a folder of images, one sub-folder an identity, into RecordIO shards."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from .errors import UsageError
from .images import SUFFIXES, Encoding, encode_file, why_unreadable
from .manifest import printable
from .shards import ShardedWriter, check_output
from .workers import Progress, parallel_map


@dataclass(frozen=True)
class PackSummary:
    """What a pack verb did; ``bytes`` of all ``.rec`` files, ``skipped`` images as (file, reason)."""

    path: Path
    images: int
    identities: int
    shards: int
    bytes: int
    skipped: list[tuple[str, str]] = field(default_factory=list)
    ignored_files: int = 0  # files in the source that are no images by their names
    empty_identities: list[str] = field(default_factory=list)  # all of their images were unreadable

    def __str__(self) -> str:
        lines = [
            f"packed {self.images:,} images of {self.identities:,} identities into {self.shards} shard(s), "
            f"{self.bytes / 1e6:,.1f} MB: {self.path}"
        ]
        if self.skipped:
            lines.append(f"skipped {len(self.skipped):,} unreadable image(s):")
            lines += [f"  {file}: {reason}" for file, reason in self.skipped[:10]]
            if len(self.skipped) > 10:
                lines.append(f"  and {len(self.skipped) - 10:,} more: {self.path / SKIPPED_NAME}")
        if self.empty_identities:
            lines.append(f"identities without a readable image: {_some(self.empty_identities)}")
        if self.ignored_files:
            lines.append(f"ignored {self.ignored_files:,} file(s) that are no images by their names")
        return printable("\n".join(lines))


SKIPPED_NAME = "skipped.tsv"


def pack_folder(
    src: str | Path,
    out: str | Path,
    *,
    size: int | tuple[int, int] | None = 112,
    quality: int = 95,
    encoding: Encoding = "jpeg",
    shards: int = 1,
    workers: int | None = None,
    seed: int = 0,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackSummary:
    """Pack ``src``, whose sub-folders are the identities, into a data set at ``out``.

    Labels are the places of the sub-folders' names in sorted order. Images (jpg, jpeg, png, bmp, webp, pgm,
    at any depth in a sub-folder) become upright RGB of ``size`` (pixels; a number for squares, or (height,
    width)): scaled until they cover it, the rest cut off on both sides alike, so nothing is distorted. None
    keeps each image's size. An image that has format and size already keeps its bytes. The order on disk is a
    shuffle of all images by ``seed``; the result does not depend on ``workers`` (None: one a core).

    An unreadable image is skipped, and named in the summary and in ``out``/skipped.tsv. UsageError where src
    is not such a folder, a sub-folder has no image, or ``out`` holds something (``overwrite`` replaces a
    packed data set, nothing else).
    """
    src, out = Path(src), Path(out)
    target = _target_size(size)
    if not 1 <= quality <= 100:
        raise UsageError(f"quality {quality}: JPEG qualities go from 1 to 100")
    if encoding not in get_args(Encoding):
        raise UsageError(f"encoding {encoding!r}: it is one of {', '.join(get_args(Encoding))}")
    check_output(out, overwrite=overwrite)
    _check_apart(src, out)
    names, files, ignored = _find_images(src)

    order = np.random.default_rng(seed).permutation(len(files))
    encode = partial(_encode_or_explain, size=target, quality=quality, encoding=encoding)
    encoded = parallel_map(encode, (files[i][1] for i in order), workers=workers)

    skipped: list[tuple[str, str]] = []
    readable = np.zeros(len(names), dtype=bool)
    writer = ShardedWriter(
        out,
        identities=names,
        image_size=target,
        source=printable(f"folder {src.resolve()}"),
        name=name,
        creation={"size": target, "quality": quality, "encoding": encoding, "shards": shards, "seed": seed},
        shards=shards,
        overwrite=overwrite,
    )
    with writer:
        for done, (i, result) in enumerate(zip(order, encoded, strict=True), start=1):
            label, path = files[i]
            if isinstance(result, bytes):
                writer.write(label, result)
                readable[label] = True
            else:
                skipped.append((str(path.relative_to(src)), result))
            if progress is not None and (done % 64 == 0 or done == len(files)):
                progress(done, len(files))
        skipped.sort()
        if not readable.any():
            raise UsageError(f"{src}: none of its {len(files)} images can be read, e.g. {': '.join(skipped[0])}")
        if skipped:
            lines = [f"{file}\t{reason}\n" for file, reason in skipped]
            (writer.folder / SKIPPED_NAME).write_text(printable("".join(lines)), encoding="utf-8")
    return PackSummary(
        path=out,
        images=writer.images,
        identities=writer.identities,
        shards=shards,
        bytes=writer.bytes,
        skipped=skipped,
        ignored_files=ignored,
        empty_identities=[names[label] for label in np.flatnonzero(~readable)],
    )


def _encode_or_explain(path: Path, *, size: tuple[int, int] | None, quality: int, encoding: Encoding) -> bytes | str:
    """The encoded image, or why it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks about odd metadata of an image that it can read
            return encode_file(path, size=size, quality=quality, encoding=encoding)
    except Exception as error:  # Pillow's decoders raise nearly anything about a damaged file
        return why_unreadable(error)


def _target_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UsageError(f"size {height}×{width}: height and width are at least 1 pixel")
    return height, width


def _check_apart(src: Path, out: Path) -> None:
    here, there = src.resolve(), out.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise UsageError(f"{out} and the source {src} lie one in the other: give a place outside")


def _find_images(src: Path) -> tuple[list[str], list[tuple[int, Path]], int]:
    """Identity names in sorted order, (label, file) of every image, and the number of files that are none."""
    if not src.exists():
        raise UsageError(f"{src}: no such folder; check the path")
    if not src.is_dir():
        raise UsageError(f"{src} is a file; give the folder whose sub-folders are the identities")
    names = sorted(entry.name for entry in os.scandir(src) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UsageError(f"{src} has no sub-folders: put the images of each identity into a sub-folder of its own")
    files: list[tuple[int, Path]] = []
    ignored = 0
    without: list[str] = []
    for label, name in enumerate(names):
        before = len(files)
        for path in _walk(src / name):
            if path.suffix.lower() in SUFFIXES:
                files.append((label, path))
            else:
                ignored += 1
        if len(files) == before:
            without.append(name)
    if without:
        raise UsageError(
            f"{src}: no image in the sub-folder(s) {_some(without)}: add images "
            f"({', '.join(sorted(s[1:] for s in SUFFIXES))}) or remove the sub-folder(s)"
        )
    ignored += sum(entry.is_file() and not entry.name.startswith(".") for entry in os.scandir(src))
    return names, files, ignored


def _walk(folder: Path) -> Iterator[Path]:
    """All visible files under ``folder``, in an order that does not depend on the file system."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(place, file) for file in sorted(files) if not file.startswith("."))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
