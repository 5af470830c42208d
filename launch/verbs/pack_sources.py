"""The pack verbs for what a person brings: a folder, a list file, RecordIO, a table."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .pack_arguments import Out, Root, pack_verb

if TYPE_CHECKING:
    from ...data import PackSummary


@pack_verb(numbered=False)
def folder(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Folder with one sub-folder for each identity; or its address, s3://..."),
    ],
    out: Out,
    **options: Any,
) -> "PackSummary":
    """Pack your own images: one sub-folder an identity, jpg, png, bmp, webp or pgm.

    Images are scaled to cover the size and cropped at the centre; a JPEG that has the size already is stored as it is.
    An unreadable image is named, counted and left out. What was interrupted goes on when the command is given again.
    """
    from ...data import pack_folder

    return pack_folder(source, out, **options)


@pack_verb()
def list_file(
    source: Annotated[
        Path, typer.Argument(metavar="SRC.lst", help="Lines 'index TAB label TAB path', as im2rec takes them.")
    ],
    out: Out,
    root: Root = None,
    **options: Any,
) -> "PackSummary":
    """Pack the images of a list file, MXNet's im2rec's format.

    Of several labels in a line the first is the class. Images are treated as by 'pfc pack folder'.
    """
    from ...data import pack_list

    return pack_list(source, out, root=root, **options)


@pack_verb(files=False)
def recordio(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SRC...", help="Data sets: folders of .rec and .idx files, or single .rec.")
    ],
    out: Out,
    labels: Annotated[
        Literal["apart", "shared"],
        typer.Option(help="Of several sets: identities are all different, or the same where their names are."),
    ] = "apart",
    without_images: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Leave out the images with the numbers in this file, one a line, counted from 0 over all of SRC: as "
            "pfc centers writes it.",
            show_default=False,
        ),
    ] = None,
    **options: Any,
) -> "PackSummary":
    """Repack RecordIO: other shards, another order, fewer identities, several sets in one.

    Reads pfc's own sets, im2rec's and InsightFace's. Images keep their bytes; with --size or --encoding, those that
    have another are converted. Of a record whose label does not change only the id does, which is its key.
    """
    from ...data import pack_recordio

    return pack_recordio(sources, out, joining=labels, without_images=without_images, **options)


@pack_verb()
def webdataset(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC...", help="Tar files, folders of them, or addresses; {000..099} for numbers."),
    ],
    out: Out,
    label: Annotated[
        str,
        typer.Option(
            metavar="ENDING|json:KEY|folder",
            help="Where a sample's identity is: the file with this ending, a key of its .json, or its folder.",
        ),
    ] = "cls",
    **options: Any,
) -> "PackSummary":
    """Pack the images of WebDataset tar files: 000123.jpg with 000123.cls, .txt or .json beside it.

    Remote files are copied next to OUT first, and removed in the end. Images are treated as by 'pfc pack folder'.
    """
    from ...data import pack_webdataset

    return pack_webdataset(sources, out, label=label, **options)


@pack_verb()
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
    align: Annotated[
        bool,
        typer.Option(
            "--align",
            help="Warp each face by its landmarks in the columns x1, y1, ..., x5, y5: left eye, right eye, nose, left "
            "and right corner of the mouth, in pixels. Find them with a detector of your own.",
        ),
    ] = False,
    **options: Any,
) -> "PackSummary":
    """Pack the images of a table: CSV or TSV with a header line, or Parquet.

    Parquet may hold the images themselves, as Hugging Face's data sets do; it needs pip install 'pfc\\[parquet]'.
    Images are treated as by 'pfc pack folder', or with --align warped to ArcFace's five points, which needs
    pip install 'pfc\\[align]'; those without landmarks are named, counted and left out.
    """
    from ...data import pack_table

    return pack_table(
        source, out, root=root, path_column=path_column, label_column=label_column, align=align, **options
    )
