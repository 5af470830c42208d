"""``pfc embed``: embeddings of a packed data set, or of a folder of images."""

import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ...data.errors import UsageError
from ..console import find_device, progress_bar, warn
from ..models import BatchSize, Device, Flip, Source, check_new_file, open_backbone, write_whole

if TYPE_CHECKING:
    from ...engine.sharing.shards import Images, Shards

_FILES = (".npz", ".npy")
_CHUNK = 4  # batches that are read, decoded and embedded at a time
_SECONDS_BETWEEN_LINES = 5.0


def embed(
    source: Source,
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A packed data set, or a folder of image files.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT.npz|OUT.npy|FOLDER", help="New file; or a folder, to go on with if begun.")
    ],
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Of the embeddings in the files.")] = "float32",
    format: Annotated[
        Literal["npy", "parquet"] | None,
        typer.Option(help="Of the files in FOLDER. [dim]\\[default: npy][/dim]", show_default=False),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images for each file in FOLDER. [dim]\\[default: 65536][/dim]", show_default=False),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Ranks that share FOLDER's files: one a GPU, or processes on a CPU."),
    ] = None,
    device: Device = "auto",
    batch_size: BatchSize = 128,
    flip: Flip = None,
) -> int:
    """Compute embeddings [N, D], each of length 1, in the precision of the network's run.

    OUT.npz holds `embeddings` and, of a packed data set, `labels` (int64 [N]), or of a folder, `names` (the files'
    paths in it). OUT.npy holds the embeddings alone. Unreadable files in a folder are named, counted and left out.

    FOLDER is for any number of images, one shard of them in memory: embeddings-00000.npy, ... with names, or labels and
    numbers, beside each, and manifest.json when all are there. Interrupted, the same command goes on with the first
    shard that is missing. See docs/sharing.md.
    """
    if out.suffix in _FILES:
        if (format, shard_size, nproc) != (None, None, None):
            raise UsageError(f"{out} is one file: --format, --shard-size and --nproc are for a folder of files")
        check_new_file(out, *_FILES)
        _embed_whole(source, images, out, dtype, device, batch_size, flip)
        return 0
    if (out.exists() and not out.is_dir()) or out.suffix in (".txt", ".csv", ".parquet"):
        raise UsageError(f"{out}: give a new .npz or .npy file, or a folder")
    if format == "parquet":
        _need_parquet()
    from ..rank import preload
    from ..spawn import run_ranks

    found = _packed_or_folder(images)
    told = {"dtype": dtype, "format": format or "npy", "shard_size": shard_size or 1 << 16, "batch_size": batch_size}
    work = partial(_embed_shards, source, found, out, told, device, flip)
    if nproc in (None, 1) or "WORLD_SIZE" in os.environ:
        return work()
    preload("pfc.engine.sharing.shards")
    return run_ranks(work, nproc)


def open_some(path: Path, most: int) -> list[Any]:
    """At most so many encoded images, spread over a packed set or a folder; of those the unreadable are left out.

    Raises:
        UsageError: none can be read.
    """
    found = _packed_or_folder(path)
    chosen = {place * found.total // min(found.total, most) for place in range(min(found.total, most))}
    good = []
    for place, item in enumerate(found.items()):
        if place in chosen:
            try:
                encoded = found.read(item)[0]
            except (OSError, UsageError) as error:
                warn(f"{item}: unreadable, left out: {error}")
                continue
            if (problem := _problem(encoded)) is None:
                good.append(encoded)
            else:
                warn(f"{item}: unreadable, left out: {problem}")
    if not good:
        raise UsageError(f"{path} holds no readable image")
    return good


def _embed_whole(
    source: Path, images: Path, out: Path, dtype: str, device: str, batch_size: int, flip: bool | None
) -> None:
    import numpy as np
    from torch.nn.functional import normalize

    where = find_device(device)
    trained = open_backbone(source, where)
    encoded, identified = _open_images(images)
    embeddings = trained.embed(encoded, trained.reading(where, batch_size, flip=flip))
    unit = normalize(embeddings).numpy().astype(dtype)
    if out.suffix == ".npy":
        write_whole(out, lambda path: np.save(path, unit))
    else:
        write_whole(out, lambda path: np.savez(path, embeddings=unit, **identified))
    print(f"wrote {len(unit):,} embeddings of {unit.shape[1]} numbers: {out}")


def _embed_shards(
    source: Path, images: "Images", out: Path, told: dict[str, Any], device: str, flip: bool | None
) -> int:
    """This rank's shards; the last rank to be done writes the manifest."""
    from ...engine.checkpoint import find
    from ...engine.sharing.shards import Shards, embed_shard, network_identity

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = find_device(device)
    trained = open_backbone(source, where)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    reading = trained.reading(where, told["batch_size"], flip=flip, ranks=local)
    checkpoint = find(source)
    told = {
        **told,
        "dim": trained.embedding_dim,
        "network": {"checkpoint": checkpoint.path.name, "weights": network_identity(trained.model)},
        "flip": reading["flip"],
        "precision": trained.precision,
        "device": where.type,
    }
    shards = Shards(out, images, told)
    if shards.complete:
        print(f"{out} is complete: {images.total:,} images; nothing is left to do")
        return 0
    progress = _Progress(shards, silent=rank > 0)
    for number, items in shards.missing(rank, ranks):
        embeddings, beside = embed_shard(
            items,
            images,
            lambda encoded: trained.embed(encoded, reading),
            dim=trained.embedding_dim,
            chunk=_CHUNK * told["batch_size"],
            left_out=lambda item, problem: warn(f"{item}: unreadable, left out: {problem}"),
            moved=progress,
        )
        shards.write(number, embeddings, beside)
        progress.written()
    manifest = shards.finish()
    if manifest is not None:
        if left := manifest["left_out"]:
            warn(f"{left:,} of {images.total:,} images left out")
        count, files = manifest["count"], len(manifest["shards"])
        kind = f"{manifest['dim']} numbers, {manifest['dtype']}"
        print(f"wrote {count:,} embeddings of {kind}, in {files:,} shard(s): {out}")
    return 0


class _Progress:
    """A line on stderr now and then: images of all ranks, images/s, and how long it will take."""

    def __init__(self, shards: "Shards", *, silent: bool) -> None:
        self._shards, self._silent = shards, silent
        self._own = 0  # of the shard that is being embedded
        self._first = self._done()
        self._begun = self._told = time.monotonic()

    def __call__(self, images: int) -> None:
        self._own += images
        now = time.monotonic()
        if self._silent or now - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._told = now
        from ...engine.log.telemetry import clock_time

        total, done = self._shards.images.total, self._done()
        rate = (done - self._first) / (now - self._begun)
        left = clock_time((total - done) / rate) if rate else "unknown"
        print(f"embedded   {done:,}/{total:,}   {done / total:.0%}   {rate:,.0f} img/s   eta {left}", file=sys.stderr)

    def written(self) -> None:
        """The shard is on the disk."""
        self._own = 0

    def _done(self) -> int:
        """Of all ranks those in whole shards, and of this one those of the shard that is not whole yet."""
        size, total = self._shards.size, self._shards.images.total
        numbers = (number for number in range(self._shards.count) if self._shards.path(number).exists())
        return self._own + sum(min(size, total - number * size) for number in numbers)


def _need_parquet() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UsageError("--format parquet needs pyarrow: pip install 'pfc[parquet]'") from None


def _is_packed(path: Path) -> bool:
    return path.suffix == ".rec" or any(path.glob("*.rec")) or not path.is_dir()


def _packed_or_folder(path: Path) -> "Images":
    from ...engine.sharing.shards import Folder, Packed

    return Packed(path) if _is_packed(path) else Folder(path)


def _open_images(path: Path) -> tuple[Sequence[Any], dict[str, Any]]:
    """The encoded images of a packed data set or of a folder, and the array that says which is which."""
    import numpy as np

    from ...data import RecordDataset
    from ...data.images import SUFFIXES
    from ...data.protocols.images import WhenAsked

    if _is_packed(path):
        dataset = RecordDataset.open(path)
        return WhenAsked(lambda i: dataset.read(i)[1], range(len(dataset))), {"labels": dataset.labels()}
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    files = _readable(files)
    if not files:
        raise UsageError(f"{path} holds no readable image ({', '.join(sorted(SUFFIXES))}) and no .rec file")
    names = np.array([file.relative_to(path).as_posix() for file in files])
    return WhenAsked(lambda i: files[i].read_bytes(), range(len(files))), {"names": names}


def _readable(files: list[Path]) -> list[Path]:
    """The files that Pillow can decode; the others are named on stderr."""
    from concurrent.futures import ThreadPoolExecutor

    good: list[Path] = []
    with ThreadPoolExecutor() as pool, progress_bar("checking") as progress:
        for done, (file, problem) in enumerate(zip(files, pool.map(_problem, files), strict=True), 1):
            progress(done, len(files))
            if problem is None:
                good.append(file)
            else:
                warn(f"{file}: unreadable, left out: {problem}")
    if bad := len(files) - len(good):
        warn(f"{bad:,} of {len(files):,} files left out")
    return good


def _problem(file: Any) -> str | None:
    """What is wrong with an image, a file or its bytes; None for nothing."""
    import io

    from PIL import Image

    try:
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise nearly anything about a damaged file
        return " ".join(str(error).split()) or type(error).__name__
    return None
