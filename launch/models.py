"""A trained backbone, opened for use."""

import os
import shutil
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..data.atomic import unfinished_name
from ..data.errors import DamagedRecord, UndecodableImage, UsageError
from .console import complete_run, progress_bar, warn

if TYPE_CHECKING:
    import torch

    from ..data.protocols.table import Protocol
    from ..engine.device import Precision
    from ..engine.evaluation.evaluate import Encoded
    from ..engine.review.embedded import Batch, Embedded

Source = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_CHECKPOINT",
        help="A run's folder (its latest checkpoint) or one checkpoint.",
        autocompletion=complete_run,
    ),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Where to compute.")]
Flip = Annotated[
    bool | None,
    typer.Option(
        "--flip/--no-flip",
        help="Add the embedding of the mirror image. [dim]\\[default: as the run's evaluation does][/dim]",
        show_default=False,
    ),
]
Samples = Annotated[
    int, typer.Option("--bootstrap", min=0, metavar="N", help="Draws of identities for the intervals; 0: none.")
]
Memory = Annotated[
    int, typer.Option("--memory", min=1, metavar="MIB", help="Memory of a search, besides embeddings and mates.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in one forward pass.")]
Run = Annotated[
    Path,
    typer.Option(
        "--run",
        metavar="RUN_OR_CHECKPOINT",
        help="A run's folder, or one checkpoint: what embeds.",
        autocompletion=complete_run,
    ),
]
NewFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")]
_CHUNK = 512  # images that are read at a time


class Images(typing.Protocol):
    """Images with labels, as ``RecordDataset`` has them."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> "tuple[int, Encoded]": ...


class Trained(NamedTuple):
    """A backbone in eval mode: images [b, 3, H, W] float32 in [-1, 1] → embeddings [b, D] float32."""

    model: "torch.nn.Module"
    image_size: tuple[int, int]
    embedding_dim: int
    flip: bool
    """Whether its run adds the mirror image's embedding in evaluation."""
    precision: "Precision"
    """Of its run, which evaluates in it too."""

    def reading(
        self, device: "torch.device", batch_size: int, *, flip: bool | None = None, ranks: int = 1
    ) -> dict[str, Any]:
        """How images are read and embedded; as its run does where ``flip`` is None, by one of ``ranks`` processes."""
        from .machine import usable_cores

        return {
            "image_size": self.image_size,
            "device": device,
            "batch_size": batch_size,
            "flip": self.flip if flip is None else flip,
            "threads": max(1, usable_cores() // ranks),
        }

    def embed(self, images: "Sequence[Encoded]", reading: dict[str, Any]) -> "torch.Tensor":
        """Embeddings of encoded images, float32 [N, D] on the CPU, not normalised, in the precision of its run."""
        from ..engine.evaluation.evaluate import embed_images

        with self.autocast(reading["device"]):
            return embed_images(self.model, images, **reading)

    def embed_protocol(self, protocol: "Protocol", reading: dict[str, Any]) -> "torch.Tensor":
        """Of a protocol's images, aligned where it has landmarks."""
        from ..data.protocols.images import open_images
        from ..engine.evaluation.protocol import embed_protocol

        images = open_images(protocol.images, protocol.folder, protocol.landmarks, self.image_size)
        with self.autocast(reading["device"]):
            return embed_protocol(self.model, protocol, images, **reading)

    def autocast(self, device: "torch.device") -> "torch.autocast":
        """The arithmetic of its run: what ``pfc evaluate`` and ``pfc embed`` compute in, on any device."""
        from ..engine.device import autocast

        return autocast(self.precision, device)


def open_backbone(source: Path, device: "torch.device") -> Trained:
    """The backbone of a run or checkpoint, on ``device``."""
    from ..engine.build import input_size
    from ..engine.checkpoint import load_backbone

    model, config = load_backbone(source)
    section = config.evaluation
    return Trained(model.to(device), input_size(config), config.backbone.embedding_dim, section.flip, config.precision)


def check_new_file(path: Path, *suffixes: str) -> None:
    """UsageError where ``path`` cannot be written as a new file of one of these kinds."""
    if path.suffix not in suffixes:
        raise UsageError(f"{path}: the name must end in {' or '.join(suffixes)}")
    if path.exists():
        raise UsageError(f"{path} exists already: name another file, or remove it first")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{path}: no file can be made in {above}: name another folder")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary name in the same folder and renames the file when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = unfinished_name(path).with_suffix(path.suffix)
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def embedded(
    trained: Trained,
    dataset: Images,
    device: "torch.device",
    batch_size: int,
    progress: Callable[[int, int], object],
) -> "Iterator[Batch]":
    """The images of a data set, some hundreds at a time, without mirror images; those that cannot be read are named on
    stderr and left out."""
    import numpy as np

    from ..engine.review.embedded import Batch

    for start in range(0, len(dataset), _CHUNK):
        stop = min(start + _CHUNK, len(dataset))
        numbers, labels, images = [], [], []
        for number in range(start, stop):
            try:
                label, image = dataset.read(number)
            except DamagedRecord as error:
                warn(f"image {number} is left out: {error}")
                continue
            numbers.append(number)
            labels.append(label)
            images.append(image)
        while images:
            try:
                embeddings = trained.embed(images, trained.reading(device, batch_size, flip=False))
            except UndecodableImage as error:
                warn(f"image {numbers[error.place]} is left out: it cannot be decoded: {error.problem}")
                for one in (numbers, labels, images):
                    del one[error.place]
                continue
            yield Batch(np.array(numbers, dtype=np.int64), np.array(labels, dtype=np.int64), embeddings, images)
            break
        progress(stop, len(dataset))


@contextmanager
def stored_embeddings(
    trained: Trained, dataset: Images, device: "torch.device", batch_size: int, file: Path
) -> "Iterator[Embedded]":
    """The embeddings of a data set, in ``file`` as long as the block lasts; shows progress."""
    from ..engine.review.embedded import store

    try:
        with progress_bar("embedding") as progress:
            found = store(embedded(trained, dataset, device, batch_size, progress), len(dataset), file)
        if left := len(dataset) - len(found.rows):
            warn(f"{left:,} of {len(dataset):,} images are left out")
        yield found
    finally:
        file.unlink(missing_ok=True)


def check_new_folder(path: Path) -> None:
    """UsageError where ``path`` cannot be written as a new folder."""
    if path.exists():
        raise UsageError(f"{path} exists already: name another folder, or remove it first")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder next to ``path``, which it becomes if the block succeeds; otherwise it is removed.

    Raises:
        UsageError: ``path`` exists, or no folder can be made there.
    """
    check_new_folder(path)
    partial = unfinished_name(path)
    try:
        partial.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{path}: a file is where its folder should be; name another folder") from None
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
