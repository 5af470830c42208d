"""Embeddings of millions of images in a folder, in shards: each is complete or not there, so that a run can go on.

    manifest.json            written last: how many, of what, by which network, which files
    embeddings-00000.npy     [n, D], each of length 1
    names-00000.npy          of a folder of images: their paths in it
    labels-00000.npy         of a packed set: int64 [n]; and numbers-00000.npy, of the images in the set

or ``embeddings-00000.parquet`` with columns embedding, and name or label and number. Shard k is of the images from
k · shard_size on; those that cannot be read are left out.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, isfinite, nn, uint8
from torch.nn.functional import normalize

from ...data import RecordDataset
from ...data.atomic import make_folder, replacing
from ...data.errors import UndecodableImage, UsageError
from ...data.images import SUFFIXES

MANIFEST, BEGUN = "manifest.json", ".begun.json"
_READERS = 8  # threads that read files ahead of the network
_WHATS = {
    "network": "another network or checkpoint",
    "images": "other images",
    "format": "another --format",
    "dtype": "another --dtype",
    "shard_size": "another --shard-size",
    "batch_size": "another --batch-size",
    "flip": "another choice of --flip",
    "device": "another kind of device",
}


class Images(Protocol):
    """Images to embed. Attributes: ``total``, their number; ``told``, which ones they are, for JSON."""

    total: int
    told: dict[str, Any]

    def items(self) -> Iterator[Any]:
        """What each is called here, always in the same order."""
        ...

    def read(self, item: Any) -> tuple[bytes | NDArray[np.uint8], int | None]:
        """The encoded image and its label; OSError or UsageError where it cannot be read."""
        ...

    def beside(self, items: Sequence[Any], labels: Sequence[int | None]) -> dict[str, NDArray[Any]]:
        """What stands beside the embeddings."""
        ...

    def check_unchanged(self) -> None:
        """UsageError where they are others by now."""
        ...


class Folder:
    """The image files in a folder and those below it, in the order of their paths. The list is not kept in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.total, digest = 0, hashlib.sha256()
        for name, status in self._walk(""):
            self.total += 1
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
        if not self.total:
            raise UsageError(f"{path} holds no image ({', '.join(sorted(SUFFIXES))}) and no .rec file")
        self.told = {"folder": path.resolve().name, "images": self.total, "sha256": digest.hexdigest()}

    def check_unchanged(self) -> None:
        if Folder(self.path).told != self.told:
            raise UsageError(
                f"{self.path}: images were added, removed or changed while it was embedded: remove what was written "
                "and give the command again"
            )

    def items(self) -> Iterator[str]:
        return (name for name, _ in self._walk(""))

    def read(self, item: str) -> tuple[bytes, None]:
        return (self.path / item).read_bytes(), None

    def beside(self, items: Sequence[str], labels: Sequence[int | None]) -> dict[str, NDArray[Any]]:
        return {"names": np.array(items, dtype=str)}

    def _walk(self, below: str) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(self.path / below) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            name = f"{below}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(f"{name}/")
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():
                yield name, entry.stat()


class Packed:
    """The images of a packed data set."""

    def __init__(self, path: Path) -> None:
        self.dataset = RecordDataset.open(path)
        self.total = len(self.dataset)
        digest = hashlib.sha256()
        hashes = {} if self.dataset.manifest is None else {one.rec: one.sha256 for one in self.dataset.manifest.shards}
        for shard in self.dataset.shards:
            name = shard.file.path.name
            digest.update(f"{name}\0{shard.file.size}\0{shard.images}\0{hashes.get(name)}\0".encode())
        self.told = {"set": self.dataset.name, "images": self.total, "sha256": digest.hexdigest()}

    def check_unchanged(self) -> None:
        """Its shards are mapped: they are those that were opened."""

    def items(self) -> Iterator[int]:
        return iter(range(self.total))

    def read(self, item: int) -> tuple[NDArray[np.uint8], int]:
        label, image = self.dataset.read(item)
        return image, label

    def beside(self, items: Sequence[int], labels: Sequence[int | None]) -> dict[str, NDArray[Any]]:
        return {"labels": np.array(labels, dtype=np.int64), "numbers": np.array(items, dtype=np.int64)}


def network_identity(network: nn.Module) -> str:
    """By which two networks are told apart: a hash of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name}\0{value.dtype}\0{list(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(uint8).numpy())
    return digest.hexdigest()


class Shards:
    """The shards of one set of images by one network, in ``folder``.

    Args:
        images: what is embedded.
        told: what makes the numbers, for JSON: ``network``, ``dim``, ``dtype``, ``format``, ``shard_size``,
            ``batch_size``, ``flip``, ``precision`` and ``device``.

    Raises:
        UsageError: the folder is not new, and not begun by the same.
    """

    def __init__(self, folder: Path, images: Images, told: dict[str, Any]) -> None:
        self.folder, self.images = folder, images
        self.told = {**told, "images": images.told}
        self.size: int = told["shard_size"]
        self.count = -(-images.total // self.size)
        self.format: Literal["npy", "parquet"] = told["format"]
        self._check()

    def path(self, number: int, kind: str = "embeddings") -> Path:
        return self.folder / f"{kind}-{number:05d}.{self.format}"

    @property
    def complete(self) -> bool:
        return (self.folder / MANIFEST).exists()

    def rows(self, number: int) -> int | None:
        """How many embeddings a shard has; None where it is not there, or was cut off."""
        path = self.path(number)
        if not path.exists():
            return None
        if self.format == "parquet":
            import pyarrow.parquet

            try:
                return pyarrow.parquet.read_metadata(path).num_rows
            except (OSError, pyarrow.ArrowInvalid):
                return None
        try:
            return len(np.load(path, mmap_mode="r"))
        except (ValueError, EOFError):
            return None

    def missing(self, rank: int, ranks: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """This rank's shards that are not there, and their images."""
        for number, items in enumerate(_batches(self.images.items(), self.size)):
            if number % ranks == rank and self.rows(number) is None:
                yield number, items

    def write(self, number: int, embeddings: NDArray[np.floating], beside: dict[str, NDArray[Any]]) -> None:
        """One shard, [n, D] and what stands beside it; the file of embeddings, which makes it complete, comes last."""
        for leftover in self.folder.glob(f".*-{number:05d}.{self.format}.*.partial"):  # of a killed one
            leftover.unlink(missing_ok=True)
        rows = embeddings.astype(self.told["dtype"])
        if self.format == "parquet":
            self._write(self.path(number), lambda file: _write_parquet(file, rows, beside))
            return
        for kind, values in beside.items():
            self._write(self.path(number, kind), lambda file, values=values: np.save(file, values))
        self._write(self.path(number), lambda file: np.save(file, rows))

    def finish(self) -> dict[str, Any] | None:
        """Writes the manifest, and returns it; None where a shard is missing yet.

        Raises:
            UsageError: the images changed meanwhile, or none could be read.
        """
        self.images.check_unchanged()
        counts = [self.rows(number) for number in range(self.count)]
        rows = [count for count in counts if count is not None]
        if len(rows) < len(counts):
            return None
        if not sum(rows):
            raise UsageError("no image could be read: see what is wrong with them above")
        files = [{"file": self.path(number).name, "count": count} for number, count in enumerate(rows)]
        told = dict(self.told)
        summary = {"count": sum(rows), "dim": told.pop("dim"), "dtype": told.pop("dtype"), **told}
        manifest = {**summary, "left_out": self.images.total - sum(rows), "shards": files}
        self._write(self.folder / MANIFEST, lambda file: file.write(json.dumps(manifest, indent=2).encode() + b"\n"))
        for leftover in (self.folder / BEGUN, *self.folder.glob(".*.partial")):
            if not leftover.name.startswith(f".{MANIFEST}"):  # which another rank may be writing, too
                leftover.unlink(missing_ok=True)
        return manifest

    def _write(self, path: Path, write: Callable[[Any], object]) -> None:
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # before it gets its name: the power may fail

    def _check(self) -> None:
        make_folder(self.folder)
        places = [self.folder / name for name in (MANIFEST, BEGUN)]
        while not any(path.exists() for path in places):
            others = any(not path.name.endswith(".partial") for path in self.folder.iterdir())
            if not others:
                self._write(places[1], lambda file: file.write(json.dumps(self.told).encode()))
            elif not any(path.exists() for path in places):  # else another rank has just begun
                raise UsageError(f"{self.folder} is not empty, and holds no embeddings: give another folder")
        path = next(path for path in places if path.exists())
        try:
            before = json.loads(path.read_bytes())
            different = [key for key, value in self.told.items() if before.get(key) != value]
        except (ValueError, AttributeError):
            raise UsageError(f"{path} is damaged: give another folder, or remove {self.folder}") from None
        if different:
            what = _WHATS.get(different[0], f"another {different[0]}")
            raise UsageError(
                f"{self.folder} has embeddings of {what}: give the command that began it, or another folder"
            )


def embed_shard(
    items: Sequence[Any],
    images: Images,
    embed: Callable[[Sequence[Any]], Tensor],
    *,
    dim: int,
    chunk: int,
    left_out: Callable[[Any, str], object],
    moved: Callable[[int], object],
) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
    """The embeddings of these images, each of length 1, float32 [n, D], and what stands beside them.

    Args:
        embed: encoded images → embeddings [b, D], on the CPU.
        dim: D.
        chunk: images that it is given at a time.
        left_out: called for an image that cannot be read, with what is wrong.
        moved: called with the number of images that are done.

    Raises:
        UsageError: embeddings are not finite.
    """
    parts: list[NDArray[np.float32]] = []
    kept: list[Any] = []
    labels: list[int | None] = []
    for names, reading in _ahead(items, images, chunk):
        good, encoded = [], []
        for item, future in zip(names, reading, strict=True):
            try:
                image, label = future.result()
                good.append((item, label))
                encoded.append(image)
            except (OSError, UsageError) as error:
                left_out(item, (getattr(error, "strerror", None) or str(error)))
        while encoded:
            try:
                found = embed(encoded)
            except UndecodableImage as error:
                left_out(good[error.place][0], error.problem)
                del good[error.place], encoded[error.place]
                continue
            if not isfinite(found).all():
                raise UsageError("the run's embeddings are not finite: it has diverged, take an earlier checkpoint")
            parts.append(normalize(found).numpy())
            break
        kept += [item for item, _ in good]
        labels += [label for _, label in good]
        moved(len(names))
    return np.concatenate([np.zeros((0, dim), dtype=np.float32), *parts]), images.beside(kept, labels)


def _batches(items: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    rest = iter(items)
    while batch := tuple(islice(rest, size)):
        yield batch


def _ahead(items: Sequence[Any], images: Images, chunk: int) -> Iterator[tuple[Sequence[Any], list[Future[Any]]]]:
    """One chunk after the other, being read; the next one is read meanwhile."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[tuple[Sequence[Any], list[Future[Any]]]] = deque()
        for names in _batches(items, chunk):
            waiting.append((names, [pool.submit(images.read, item) for item in names]))
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting


def _write_parquet(file: Any, rows: NDArray[np.floating], beside: dict[str, NDArray[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    from ...data.records.manifest import printable

    flat = pyarrow.array(rows.reshape(-1))
    columns: dict[str, Any] = {"embedding": pyarrow.FixedSizeListArray.from_arrays(flat, rows.shape[1])}
    for kind, values in beside.items():
        plain = [printable(name) for name in values.tolist()] if kind == "names" else values
        columns[kind.removesuffix("s")] = pyarrow.array(plain)
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
