"""Writes a packed data set: shards, ``dataset.json``, and nothing at all where something goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..atomic import remove_replaced, replace_folder, restore_replaced, sync_folder, unfinished_name
from ..errors import UsageError
from ..records.labels import LabelEncoding, encode_label, encoding_for
from ..records.manifest import LABEL_NAMES_NAME, MANIFEST_NAME, Manifest, ShardEntry, printable
from ..records.mapped import make_room
from ..records.recordio import RecordWriter, pack_image, with_id
from .resume import PartialFolder, StoppedPacking

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that is full."""


class ShardedWriter:
    """Writes images into ``shards`` pairs of ``.rec`` and ``.idx`` under ``out``, with ``dataset.json``.

    Use as a context manager. Everything goes to a temporary directory next to ``out``, which takes its place
    when the block ends well; when it ends with an exception, nothing is left. Image j goes to shard j %
    shards under key j, so shards differ by one image at most and a key names one image of the whole set. The
    images come in the order in which they shall lie on disk: shuffle before.

        with ShardedWriter(out, identities=2, image_size=(112, 112), source="...") as writer:
            writer.write(label, jpeg_bytes)

    identities: how many classes there are, labels are 0 … identities − 1; or their names, which are saved too.
    image_size: (height, width) of every image, None where they differ.
    creation: parameters to keep in dataset.json.
    overwrite: replace a packed data set at ``out``; anything else there is refused (UsageError).
    resume_key: text that stands for everything that decides about the result. Then ``save`` may be called between
    images, an interrupted block leaves its folder, and the next writer with the same key goes on from the last
    ``save``, with what was given to it in ``resumed``.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        identities: int | Sequence[str],
        image_size: tuple[int, int] | None,
        source: str,
        name: str | None = None,
        creation: Mapping[str, Any] | None = None,
        shards: int = 1,
        overwrite: bool = False,
        resume_key: str | None = None,
    ) -> None:
        if shards < 1:
            raise UsageError(f"{shards} shards: it takes at least 1")
        self.out = Path(out)
        self.overwrite = overwrite
        self.identities = identities if isinstance(identities, int) else len(identities)
        self.images = 0
        self.shards = shards  # where there are fewer images, as many as these when the writer is closed
        self.bytes = 0  # of all .rec files; known when the writer is closed
        self._names = None if isinstance(identities, int) else identities
        self._image_size = image_size
        self._about = {
            "source": source,
            "name": printable(name or self.out.resolve().name),
            "creation": dict(creation or {}),
        }
        self._encoding: LabelEncoding = encoding_for(self.identities)
        self._place = self.out.resolve()
        # One shard has the names that InsightFace's own tools look for.
        stems = ["train"] if shards == 1 else [f"train-{shard:05d}" for shard in range(shards)]
        self._writers: list[RecordWriter] = []
        self.partial: PartialFolder | None = None
        self.resumed: dict[str, Any] | None = None
        self._resumable = resume_key is not None
        resumable = self._place.parent / f".{self._place.name}.partial"
        self.folder = resumable if self._resumable else unfinished_name(self._place)
        starts: list[Any] = [None] * shards
        try:
            check_output(self.out, overwrite=overwrite)
            if resume_key is None:
                self.folder.mkdir(parents=True)
            else:
                self.partial = PartialFolder(self.folder, resume_key)
                self.folder = self.partial.dataset
            restore_replaced(self._place)
            check_output(self.out, overwrite=overwrite)
            if self.partial is not None and (kept := self.partial.state) is not None:
                self.resumed, self.images, starts = kept["resumed"], kept["images"], kept["files"]
            make_room(2 * shards)
            for stem, start in zip(stems, starts, strict=True):
                self._writers.append(RecordWriter(self.folder / f"{stem}.rec", start))
        except OSError as error:
            self._leave(keep=self._resumable)
            if isinstance(error, FileNotFoundError) and self.resumed is not None:
                raise UsageError(
                    f"{error.filename} of the interrupted packing is lost: remove {self.folder.parent} and pack again"
                ) from None
            raise UsageError(f"{self.out} with {shards} shard(s) cannot be written: {error}") from None
        except BaseException:
            self._leave(keep=self._resumable)
            raise

    def write(self, label: int, image: bytes) -> None:
        """Append one encoded image (JPEG, PNG, ...)."""
        if not image:
            raise UsageError(f"image {self.images} is empty: leave it out")
        if not 0 <= label < self.identities or label != int(label):
            raise UsageError(f"label {label} is not in 0 … {self.identities - 1}, the labels of the data set")
        key = self.images
        payload = pack_image(encode_label(label, self._encoding), image, id=key)
        self._writers[key % len(self._writers)].write(key, payload)
        self.images += 1

    def write_record(self, payload: bytes) -> None:
        """Append one image record that is packed already, with a label in the encoding of this data set.

        Its id becomes its key here, as of all records that pfc writes: see ``Shard.ids_are_keys``.
        """
        key = self.images
        self._writers[key % len(self._writers)].write(key, with_id(payload, key))
        self.images += 1

    def save(self, resumed: dict[str, Any]) -> None:
        """Bring all images so far to the disk; ``resumed`` (for JSON) is what the next writer shall know."""
        assert self.partial is not None, "only a writer with a resume_key saves"
        files = [writer.sync() for writer in self._writers]
        self.partial.save({"resumed": resumed, "images": self.images, "files": files})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = error
        try:
            if kind is None:
                for writer in self._writers:
                    writer.close()
                self._finish()
        except BaseException as raised:
            failure = raised
        going_on = self._resumable and (self.images > 0 or not isinstance(failure, UsageError))
        self._leave(keep=failure is not None and (isinstance(failure, StoppedPacking) or going_on))
        if isinstance(failure, OSError) and failure.errno in FULL and not self._resumable:
            raise UsageError(
                f"{self.out} cannot be written: {(failure.strerror or '').lower()}; free some space"
            ) from None
        if failure is not None and failure is not error:
            raise failure

    def _leave(self, *, keep: bool) -> None:
        """Let go of the folder, which goes unless ``keep``."""
        for writer in self._writers:
            with suppress(OSError):  # a full disk; what went wrong has been raised already
                writer.close()
        if self.partial is not None:
            self.partial.close(keep=keep)
        elif not keep:
            shutil.rmtree(self.folder, ignore_errors=True)  # after a good end it has moved away already

    def _finish(self) -> None:
        if self.images == 0:
            raise UsageError(f"not one image to pack into {self.out}")
        for writer in self._writers[self.images :]:
            writer.remove()
        written = self._writers[: self.images]
        self.shards = len(written)
        self.bytes = sum(writer.size for writer in written)
        Manifest(
            images=self.images,
            identities=self.identities,
            image_size=self._image_size,
            label_encoding=self._encoding,
            shards=tuple(map(entry_of, written)),
            pfc=version("pfc"),
            **self._about,
        ).write(self.folder)
        if self._names is not None:
            with (self.folder / LABEL_NAMES_NAME).open("w", encoding="ascii") as file:
                file.writelines(("[\n" if i == 0 else ",\n") + json.dumps(name) for i, name in enumerate(self._names))
                file.write("\n]\n")
        if self._image_size is not None:
            height, width = self._image_size
            (self.folder / "property").write_text(f"{self.identities},{height},{width}\n", encoding="ascii")
        sync_folder(self.folder)
        try:
            check_output(self.out, overwrite=self.overwrite)  # once more: since the first time hours may have gone by
        except UsageError as error:
            again = ", or free its place and give the same command again" if self._resumable else ""
            raise StoppedPacking(f"{error}; what was packed is whole in {self.folder}: move it{again}") from None
        try:
            replace_folder(self.folder, self._place, overwrite=self.overwrite)
        except OSError as error:
            if self._resumable:
                raise
            why = f"{error.filename2 or error.filename}: {(error.strerror or str(error)).lower()}"
            raise StoppedPacking(f"{why}; what was packed is whole in {self.folder}: move it to {self.out}") from None
        remove_replaced(self._place)


def entry_of(writer: RecordWriter) -> ShardEntry:
    """What dataset.json says of the shard that ``writer`` wrote."""
    return ShardEntry(
        rec=writer.path.name,
        idx=writer.path.with_suffix(".idx").name,
        images=writer.records,
        bytes=writer.size,
        sha256=writer.sha256,
    )


def check_output(out: Path, *, overwrite: bool | None) -> None:
    """UsageError unless ``out`` is new or empty, or a packed data set to overwrite.

    ``overwrite`` is None where the caller offers no overwriting.
    """
    try:
        there = out.exists()
    except OSError as error:  # a name that is too long, or a disk that does not answer
        raise UsageError(f"{out} cannot be written: {(error.strerror or str(error)).lower()}") from None
    if not there:
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file; give a directory that does not exist yet")
    if os.path.ismount(out.resolve()):  # what is packed becomes it by renaming, which ends at a file system's border
        raise UsageError(f"{out} is where a disk is mounted: give a directory in it, such as {out / 'train'}")
    if next(out.iterdir(), None) is None:
        return
    if not overwrite:
        choice = "" if overwrite is None else ", or overwrite the data set that is there (--overwrite)"
        raise UsageError(f"{out} is not empty: give another directory{choice}")
    if not (out / MANIFEST_NAME).is_file():
        raise UsageError(f"{out} is not empty and no packed data set (no {MANIFEST_NAME}): it is not overwritten")
