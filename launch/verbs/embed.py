"""``pfc embed``: embeddings of a packed data set, or of a folder of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ...data.errors import UsageError
from ..console import find_device, progress_bar, warn
from ..models import BatchSize, Device, Flip, Source, check_new_file, open_backbone, write_whole


def embed(
    source: Source,
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A packed data set, or a folder of image files.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.npz|OUT.npy", help="File to write; it must not exist.")],
    device: Device = "auto",
    batch_size: BatchSize = 128,
    flip: Flip = None,
) -> None:
    """Compute embeddings, float32 [N, D], each of length 1, in the precision of the network's run.

    OUT.npz holds `embeddings` and, of a packed data set, `labels` (int64 [N]), or of a folder, `names` (the files'
    paths in it). OUT.npy holds the embeddings alone. Unreadable files in a folder are named, counted and left out.
    """
    check_new_file(out, ".npz", ".npy")
    import numpy as np
    from torch.nn.functional import normalize

    where = find_device(device)
    trained = open_backbone(source, where)
    encoded, identified = _open_images(images)
    embeddings = trained.embed(encoded, trained.reading(where, batch_size, flip=flip))
    unit = normalize(embeddings).numpy()
    if out.suffix == ".npy":
        write_whole(out, lambda path: np.save(path, unit))
    else:
        write_whole(out, lambda path: np.savez(path, embeddings=unit, **identified))
    print(f"wrote {len(unit):,} embeddings of {unit.shape[1]} numbers: {out}")


def _open_images(path: Path) -> tuple[Sequence[Any], dict[str, Any]]:
    """The encoded images of a packed data set or of a folder, and the array that says which is which."""
    import numpy as np

    from ...data import RecordDataset
    from ...data.images import SUFFIXES
    from ...data.protocols.images import WhenAsked

    packed = path.suffix == ".rec" or any(path.glob("*.rec"))
    if packed or not path.is_dir():
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


def _problem(file: Path) -> str | None:
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise nearly anything about a damaged file
        return " ".join(str(error).split()) or type(error).__name__
    return None
