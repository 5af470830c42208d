"""WebDataset: tar files in which files of one name before the first dot are a sample, as 000123.jpg and 000123.cls."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...errors import UsageError
from ...images import SUFFIXES
from ...records.manifest import printable
from ..storing import Storing
from .base import Reader, Source, Texts
from .codes import NameCodes, label_text

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_LABEL = 1 << 20  # bytes of a file that has a label
_LONGEST = 1000  # letters of a label

TarTask = tuple[int, int, int]
"""Which tar file, where the image begins there, its bytes."""


class WebDatasetSource(Source):
    """The images of ``tars``, in their order.

    label: where a sample's identity is. ``cls``, ``txt`` or any other ending: the whole of that file, a number or a
    name. ``json:KEY``: that key of its .json. ``folder``: the folder that the sample is in.

    A sample without an identity is rejected; of several images the first one is taken. UsageError where a file is no
    tar file, or no sample has an image.
    """

    def __init__(self, tars: Sequence[Path], about: str, *, label: str = "cls") -> None:
        self.about = printable(f"webdataset {about}")
        self._tars = list(tars)
        self._names = Texts()
        self._which, self._offsets, self._sizes = array("i"), array("q"), array("q")
        self.rejected: list[tuple[str, str]] = []
        known, labels = array("b"), NameCodes()
        for number, tar in enumerate(self._tars):
            for key, image, found in self._samples(tar, label):
                if image is None:
                    continue
                self._names.append(os.fsencode(f"{tar.name}/{key}"))
                self._which.append(number)
                self._offsets.append(image.offset_data)
                self._sizes.append(image.size)
                known.append(isinstance(found, str))
                if isinstance(found, str):
                    labels.append(found)
                else:
                    self.rejected.append((self._names[-1], f"it has no identity: {found[0]}"))
        if not len(self._names):
            raise UsageError(f"{about}: no sample with an image ({', '.join(sorted(SUFFIXES))}) in the tar files")
        self.names, self.numbers, codes, _ = labels.finish()
        there = np.frombuffer(known, dtype=np.int8) > 0
        if not there.any():
            raise UsageError(f"{about}: {printable(': '.join(self.rejected[0]))}; say with --label where it is")
        self.codes = np.full(len(there), -1, dtype=np.int32)
        self.codes[there] = codes

    def _samples(self, path: Path, label: str) -> Iterator[tuple[str, tarfile.TarInfo | None, str | tuple[str]]]:
        """(name, its image, its identity or why there is none) of every sample; ``ignored_files`` counts the others."""
        kind, _, key = label.partition(":")
        missing = (f"no .{kind} beside it" if kind != "folder" else "it is in no folder",)
        name, image, found = None, None, missing
        try:
            with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it keeps all that it has seen
                    folder, _, base = member.name.removeprefix("./").rpartition("/")
                    stem, _, ending = base.partition(".")
                    if not member.isreg() or not stem:
                        self.ignored_files += not member.isdir() and bool(stem)  # links
                        continue
                    here = f"{folder}/{stem}" if folder else stem
                    if here != name:
                        if name is not None:
                            yield name, image, found
                        name, image, found = here, None, missing
                        if kind == "folder" and folder:
                            found = folder.rpartition("/")[2]
                    if os.path.splitext(base)[1].lower() in SUFFIXES and image is None and not member.issparse():
                        image = member
                    elif ending.lower() == kind.lower():
                        found = _label(tar.extractfile(member), member.size, key if kind == "json" else None)
                    else:
                        self.ignored_files += 1
                file.seek(tar.offset)  # which the module does not look at: a file may just end
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise EOFError("its end is missing")
        except (tarfile.TarError, EOFError) as error:
            raise UsageError(
                f"{path}: no tar file that is whole and not compressed ({str(error).lower()}): copy it again, or "
                "uncompress it (gunzip)"
            ) from None
        except OSError as error:
            raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}; check the path") from None
        if name is not None:
            yield name, image, found

    def reader(self, store: Storing, identities: int, *, shuffled: bool) -> Reader:
        return TarReader(self._tars, store)

    def task(self, image: int, label: int) -> TarTask:
        return self._which[image], self._offsets[image], self._sizes[image]

    def describe(self, image: int) -> str:
        return self._names[image]

    def content(self) -> Iterator[bytes]:
        yield from super().content()
        yield self._names.digest()
        yield hashlib.sha256(self._offsets.tobytes() + self._sizes.tobytes()).digest()


def _label(file: IO[bytes] | None, size: int, key: str | None) -> str | tuple[str]:
    """The identity by the file that has it, or why it has none."""
    if file is None or size > _MOST_LABEL:
        return (f"the file of its label has {size:,} bytes",)
    try:
        text = file.read().decode("utf-8-sig").strip()
        value: Any = text if key is None else json.loads(text)[key]
        label = label_text("its label", value)
        return (
            label if len(label) <= _LONGEST and label.isprintable() else ("its label is no number or name of one line",)
        )
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        return ("its label cannot be read" if key is None else f"its .json has no {key}",)
    except UsageError as error:
        return (str(error).removeprefix("its label has no label").removeprefix("its label: ") or "its label is empty",)


class TarReader:
    """Stores one image of a tar file."""

    def __init__(self, tars: list[Path], store: Storing) -> None:
        self.tars = tars
        self.store = store

    def __call__(self, task: TarTask) -> bytes | str:
        which, offset, size = task
        with open(self.tars[which], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        return self.store(data, None) if len(data) == size else "the tar file was cut short meanwhile"


def expanded(sources: Sequence[str]) -> list[str]:
    """The tar files that ``sources`` name: files, folders of .tar files, addresses, with {000..099} for numbers.

    UsageError where one names none.
    """
    found: list[str] = []
    for source in sources:
        braces = _BRACES.search(source)
        if braces is not None:
            first, last = braces.groups()
            numbers = range(int(first), int(last) + 1)
            if not numbers:
                raise UsageError(f"{source}: {braces[0]} names nothing: give the smaller number first")
            found += expanded([_BRACES.sub(f"{number:0{len(first)}}", source, count=1) for number in numbers])
        elif os.path.isdir(source):
            inside = sorted(glob.glob(os.path.join(glob.escape(source), "*.tar")))
            if not inside:
                raise UsageError(f"{source} holds no .tar file: give the folder that holds them")
            found += inside
        else:
            found.append(source)
    if not found:
        raise UsageError("no tar file to pack: name at least one")
    return found
