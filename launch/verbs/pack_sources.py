"""The pack verbs for what a person brings: a folder, a list file, RecordIO, a table."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..console import parse_size, progress_bar
from .pack_arguments import (
    Encoding,
    ImagesPerShard,
    KeepBytes,
    KeepLabels,
    MinImages,
    Name,
    Only,
    Out,
    Overwrite,
    Quality,
    Root,
    Shards,
    Shuffle,
    ShuffleSeed,
    StoredSize,
    Strict,
    Without,
    Workers,
)

if TYPE_CHECKING:
    from ...data.packing.options import PackArguments


def folder(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder with one sub-folder for each identity.")],
    out: Out,
    size: StoredSize = None,
    encoding: Encoding = "jpeg",
    quality: Quality = 95,
    keep_bytes: KeepBytes = False,
    min_images: MinImages = None,
    only: Only = None,
    without: Without = None,
    shards: Shards = 1,
    images_per_shard: ImagesPerShard = None,
    shuffle: Shuffle = True,
    seed: ShuffleSeed = 0,
    workers: Workers = None,
    name: Name = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Pack your own images: one sub-folder an identity, jpg, png, bmp, webp or pgm.

    Images are scaled to cover the size and cropped at the centre; a JPEG that has the size already is stored as it is.
    An unreadable image is named, counted and left out. What was interrupted goes on when the command is given again.
    """
    from ...data import pack_folder

    options = _for_files(size, encoding, quality, keep_bytes)
    options |= _common(min_images, only, without, shards, images_per_shard, shuffle, seed, workers, name)
    options |= {"strict": strict, "overwrite": overwrite}
    with progress_bar("packing") as options["progress"]:
        print(pack_folder(source, out, **options))


def list_file(
    source: Annotated[
        Path, typer.Argument(metavar="SRC.lst", help="Lines 'index TAB label TAB path', as im2rec takes them.")
    ],
    out: Out,
    root: Root = None,
    size: StoredSize = None,
    encoding: Encoding = "jpeg",
    quality: Quality = 95,
    keep_bytes: KeepBytes = False,
    min_images: MinImages = None,
    only: Only = None,
    without: Without = None,
    keep_labels: KeepLabels = False,
    shards: Shards = 1,
    images_per_shard: ImagesPerShard = None,
    shuffle: Shuffle = True,
    seed: ShuffleSeed = 0,
    workers: Workers = None,
    name: Name = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Pack the images of a list file, MXNet's im2rec's format.

    Of several labels in a line the first is the class. Images are treated as by 'pfc pack folder'.
    """
    from ...data import pack_list

    options = _for_files(size, encoding, quality, keep_bytes)
    options |= _common(min_images, only, without, shards, images_per_shard, shuffle, seed, workers, name)
    options |= {"keep_labels": keep_labels, "strict": strict, "overwrite": overwrite}
    with progress_bar("packing") as options["progress"]:
        print(pack_list(source, out, root=root, **options))


def recordio(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SRC...", help="Data sets: folders of .rec and .idx files, or single .rec.")
    ],
    out: Out,
    labels: Annotated[
        Literal["apart", "shared"],
        typer.Option(help="Of several sets: identities are all different, or the same where their names are."),
    ] = "apart",
    check: Annotated[bool, typer.Option("--check", help="Decode every image; leave out those that fail.")] = False,
    size: Annotated[
        str | None, typer.Option(metavar="PX|HxW", help="Convert images of another size.", show_default=False)
    ] = None,
    encoding: Annotated[
        Literal["jpeg", "png"] | None, typer.Option(help="Encode images anew where they are not this.")
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(
            min=1, max=100, help="Of images that are encoded anew. [dim]\\[default: 95][/dim]", show_default=False
        ),
    ] = None,
    min_images: MinImages = None,
    only: Only = None,
    without: Without = None,
    keep_labels: KeepLabels = False,
    shards: Shards = 1,
    images_per_shard: ImagesPerShard = None,
    shuffle: Shuffle = True,
    seed: ShuffleSeed = 0,
    workers: Workers = None,
    name: Name = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Pack RecordIO anew: other shards, another order, fewer identities, several sets in one.

    Reads pfc's own sets, im2rec's and InsightFace's. Images keep their bytes; with --size or --encoding, those that
    have another are converted. Of a record whose label does not change only the id does, which is its key.
    """
    from ...data import pack_recordio

    options = _common(min_images, only, without, shards, images_per_shard, shuffle, seed, workers, name)
    options |= {"keep_labels": keep_labels, "strict": strict, "overwrite": overwrite, "check": check}
    if size is not None:
        options["size"] = parse_size(size)
    if encoding is not None:
        options["encoding"] = encoding
    if quality is not None:
        options["quality"] = quality
    with progress_bar("packing") as options["progress"]:
        print(pack_recordio(sources, out, joining=labels, **options))


def table(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A .csv, .tsv or .parquet file, or a folder of .parquet files.")
    ],
    out: Out,
    root: Root = None,
    path_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column of the paths, or in Parquet of the images themselves. "
            "[dim]\\[default: path, else image][/dim]",
            show_default=False,
        ),
    ] = None,
    label_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of the identities: numbers or names.")
    ] = "label",
    size: StoredSize = None,
    encoding: Encoding = "jpeg",
    quality: Quality = 95,
    keep_bytes: KeepBytes = False,
    min_images: MinImages = None,
    only: Only = None,
    without: Without = None,
    keep_labels: KeepLabels = False,
    shards: Shards = 1,
    images_per_shard: ImagesPerShard = None,
    shuffle: Shuffle = True,
    seed: ShuffleSeed = 0,
    workers: Workers = None,
    name: Name = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Pack the images of a table: CSV or TSV with a header line, or Parquet.

    Parquet may hold the images themselves, as Hugging Face's data sets do; it needs pip install 'pfc\\[parquet]'.
    Images are treated as by 'pfc pack folder'.
    """
    from ...data import pack_table

    options = _for_files(size, encoding, quality, keep_bytes)
    options |= _common(min_images, only, without, shards, images_per_shard, shuffle, seed, workers, name)
    options |= {"keep_labels": keep_labels, "strict": strict, "overwrite": overwrite}
    columns = {"path_column": path_column, "label_column": label_column}
    with progress_bar("packing") as options["progress"]:
        print(pack_table(source, out, root=root, **columns, **options))


def _for_files(size: str | None, encoding: Literal["jpeg", "png"], quality: int, keep_bytes: bool) -> "PackArguments":
    options: PackArguments = {"encoding": encoding, "quality": quality, "keep_bytes": keep_bytes}
    if size is not None:
        options["size"] = parse_size(size)
    return options


def _common(
    min_images: int | None,
    only: Path | None,
    without: Path | None,
    shards: int,
    images_per_shard: int | None,
    shuffle: bool,
    seed: int,
    workers: int | None,
    name: str | None,
) -> "PackArguments":
    options: PackArguments = {
        "only": only,
        "without": without,
        "shards": shards,
        "images_per_shard": images_per_shard,
        "shuffle": shuffle,
        "seed": seed,
        "workers": workers,
        "name": name,
    }
    if min_images is not None:
        options["min_images"] = min_images
    return options
