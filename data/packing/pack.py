"""Packs images into RecordIO shards: from a folder, a list file, other RecordIO, a table, or WebDataset.

All functions take the keyword arguments that ``PackOptions`` explains, and give a ``PackSummary``. What is packed from
one source with one seed is the same to the byte, whatever the number of workers and however often it was interrupted:
an interrupted call continues when it is repeated. UsageError on everything that the caller can fix: a source
that is not what it should be, impossible options, an ``out`` that holds something.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..remote.mirror import address_of
from ..remote.store import copy_files
from .options import PackOptions
from .run import check_apart, pack
from .sources.bucket import BucketSource
from .sources.folder import FolderSource
from .sources.listing import ListSource
from .sources.records import Joining, RecordSource
from .sources.table import table_source
from .sources.webdataset import WebDatasetSource, expanded
from .summary import PackSummary


def pack_folder(src: str | Path, out: str | Path, **given: Any) -> PackSummary:
    """Pack ``src``, whose sub-folders are the identities; ``size`` is 112 by default.

    Labels are the places of the sub-folders' names in sorted order. Images are jpg, jpeg, png, bmp, webp, pgm, at any
    depth in a sub-folder. A sub-folder without an image is refused, unless ``min_images`` is given. ``src`` may be an
    address such as s3://bucket/photos.
    """
    out, address, options = Path(out), address_of(src), _options_for_files(given)
    if address is not None:
        check_apart(out, [], options)
        return pack(BucketSource(address, allow_empty="min_images" in given), out, options)
    check_apart(out, [Path(src)], options)
    return pack(FolderSource(Path(src), allow_empty="min_images" in given), out, options)


def pack_list(src: str | Path, out: str | Path, *, root: str | Path | None = None, **given: Any) -> PackSummary:
    """Pack the images of ``src``, a list file as im2rec reads it: index TAB label [TAB more labels] TAB path.

    Paths are relative to ``root``, by default the list's own folder. ``size`` is 112 by default.
    """
    src, out = Path(src), Path(out)
    options = _options_for_files(given)
    check_apart(out, [src], options)
    return pack(ListSource(src, src.parent if root is None else Path(root)), out, options)


def pack_webdataset(
    sources: str | Path | Sequence[str | Path], out: str | Path, *, label: str = "cls", **given: Any
) -> PackSummary:
    """Pack the images of tar files in WebDataset's format; ``size`` is 112 by default.

    ``sources``: tar files, folders of them, or addresses, with {000..099} for numbers. Remote ones are copied next to
    ``out`` first, and removed when all is packed. ``label``: which file of a sample has its identity, by its ending:
    ``cls``, ``txt``, or ``json:KEY`` for a key of the .json; or ``folder``, the folder that the sample is in.
    """
    out, options = Path(out), _options_for_files(given)
    names = expanded([str(source) for source in ([sources] if isinstance(sources, str | Path) else sources)])
    addresses = [address_of(name) for name in names]
    here = [Path(name) for name, address in zip(names, addresses, strict=True) if address is None]
    check_apart(out, here, options)
    copies = out.with_name(f".{out.name}.tars")
    copied = iter(copy_files([address for address in addresses if address is not None], copies))
    tars = [Path(name) if address is None else next(copied) for name, address in zip(names, addresses, strict=True)]
    about = ", ".join(address or str(Path(name).resolve()) for name, address in zip(names, addresses, strict=True))
    summary = pack(WebDatasetSource(tars, about, label=label), out, options)
    shutil.rmtree(copies, ignore_errors=True)
    return summary


def pack_table(
    src: str | Path,
    out: str | Path,
    *,
    root: str | Path | None = None,
    path_column: str | None = None,
    label_column: str = "label",
    align: bool = False,
    **given: Any,
) -> PackSummary:
    """Pack the images of a table: .csv or .tsv with a header line, .parquet, or a folder of .parquet files.

    ``path_column`` (default: ``path``, else ``image``) has paths relative to ``root`` (default: the table's folder),
    or in Parquet the images themselves. ``label_column`` has whole numbers or names. ``size`` is 112 by default.
    ``align``: warp each face by its five landmarks, columns x1, y1, ..., x5, y5; an image without is left out. Finding
    them is up to you.
    """
    src, out = Path(src), Path(out)
    options = _options_for_files(given)
    if align and options.size is None:
        raise UsageError("aligned faces have one size: they cannot keep their own, nor their bytes")
    check_apart(out, [src], options)
    source = table_source(
        src,
        root=None if root is None else Path(root),
        path_column=path_column,
        label_column=label_column,
        align=align,
    )
    return pack(source, out, options)


def pack_recordio(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    joining: Joining = "apart",
    **given: Any,
) -> PackSummary:
    """Repack one or several RecordIO data sets: other shards, another order, fewer identities, all in one.

    Images keep their bytes, and are not decoded unless ``check`` or ``size`` asks for it; of a record whose label stays
    only the id changes, to its new key. ``joining`` says whether the identities of several sets are all different
    ("apart", then named set/name) or the same where their names are ("shared").
    """
    paths = [Path(path) for path in ([sources] if isinstance(sources, str | Path) else sources)]
    out = Path(out)
    if not paths:
        raise UsageError("no data set to pack: name at least one")
    converting = given.get("size") is not None or "encoding" in given or "quality" in given
    defaults: dict[str, Any] = {"check": False, "keep_bytes": not converting}
    options = PackOptions(**defaults | given)
    check_apart(out, paths, options)
    return pack(RecordSource(paths, joining=joining), out, options)


def _options_for_files(given: dict[str, Any]) -> PackOptions:
    defaults: dict[str, Any] = {} if given.get("keep_bytes") else {"size": 112}
    return PackOptions(**defaults | given)
