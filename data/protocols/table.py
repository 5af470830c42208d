"""A protocol as a table: one row an image, with what it is in the protocol; pairs of templates stand beside it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..alignment import landmark_columns, parse_landmarks
from ..atomic import make_folder, replacing
from ..errors import UsageError
from ..records.manifest import printable
from ..tables import columns_of, rows_of, write_csv

ROLES = ("", "gallery", "probe", "query", "distractor")
"""What an image may be; in the arrays its place here. Without a role it is searched for and found."""
COLUMNS = ("image", "identity", "template", "media", "camera", "gallery", "role", "weight", "group")
PAIR_COLUMNS = ("first", "second", "same")
_SYNONYMS = {"image": "path", "identity": "label"}
_NONE = -1

Codes = NDArray[np.int64]


@dataclass
class Protocol:
    """N images and what they are in a protocol. Codes are int64, −1 where the table has nothing.

    Attributes:
        name: of the table's file.
        folder: that the images' names are relative to.
        images: as the table names them: a file, or ``SET#NUMBER``, an image of a packed set.
        names: column → the texts that its codes stand for: identity, template, camera, gallery, group.
        identity, template, media, camera, gallery, group: int64 [N]; None where the table has no such column.
        role: places in ``ROLES``, int64 [N].
        weight: of an image in its template, float32 [N].
        landmarks: by which a face is aligned, float32 [N, 5, 2]; NaN of an image that is used as it is.
        pairs: of templates, or of images where there are no templates.
    """

    name: str
    folder: Path
    images: Sequence[str]
    identity: Codes
    role: Codes
    template: Codes | None = None
    media: Codes | None = None
    camera: Codes | None = None
    gallery: Codes | None = None
    group: Codes | None = None
    weight: NDArray[np.float32] | None = None
    landmarks: NDArray[np.float32] | None = None
    pairs: Pairs | None = None
    names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def has(self, role: str) -> bool:
        return bool((self.role == ROLES.index(role)).any())


@dataclass
class Pairs:
    """P pairs: ``first`` and ``second``, int64 [P], templates (or images) by their codes; ``same`` bool [P]."""

    first: Codes
    second: Codes
    same: NDArray[np.bool_]


def read_protocol(path: Path, folder: Path | None = None, *, pairs: bool = True) -> Protocol:
    """Reads a table (.csv, .tsv, .parquet), and the pairs of ``NAME.pairs.*`` beside it.

    Args:
        folder: that the images' names are relative to; the table's own by default.
        pairs: whether to read these.

    Raises:
        UsageError: naming the file and the row: a column is missing, a role is unknown, a row stands there twice, a
            template has two identities or roles, landmarks are incomplete, a pair names a template without images.
    """
    columns = columns_of(path)
    chosen = {}
    for name in COLUMNS:
        found = next((one for one in (name, _SYNONYMS.get(name)) if one in columns), None)
        if found is not None:
            chosen[name] = found
    if "image" not in chosen:
        there = ", ".join(map(printable, columns))
        raise UsageError(f"{path} has no column image (or path): a protocol names its images; there are: {there}")
    points = landmark_columns(path, columns)
    landmarks = array("f")
    texts: dict[str, list[str]] = {name: [] for name in chosen}
    first_seen: dict[tuple[str, ...], str] = {}
    unique = [list(chosen).index(name) for name in ("image", "template", "role", "gallery") if name in chosen]
    for where, *cells in rows_of(path, *chosen.values(), *points):
        values = ["" if cell is None or cell != cell else str(cell) for cell in cells[: len(chosen)]]
        if not values[0]:
            raise UsageError(f"{where} has no image")
        earlier = first_seen.setdefault(tuple(values[place] for place in unique), where)
        if earlier != where:
            raise UsageError(f"{where}: {printable(values[0])} is the same row as {_row_alone(earlier)}: remove one")
        for name, value in zip(chosen, values, strict=True):
            if name == "role" and value not in ROLES:
                raise UsageError(f"{where}: role {printable(value)}: allowed are {', '.join(ROLES[1:])}, or nothing")
            if name == "weight" and value:
                check_weight(where, value)
            texts[name].append(value)
        landmarks.extend(parse_landmarks(where, cells[len(chosen) :]) if points else ())
    if not texts["image"]:
        raise UsageError(f"{path} lists no image: it is empty")

    protocol = Protocol(
        path.stem,
        path.parent if folder is None else folder,
        texts["image"],
        identity=np.full(len(texts["image"]), _NONE, dtype=np.int64),
        role=np.array([ROLES.index(text) for text in texts.get("role", [])] or [0] * len(texts["image"]), np.int64),
    )
    for name in ("identity", "template", "media", "camera", "gallery", "group"):
        if name in texts:
            codes, protocol.names[name] = encode(texts[name])
            setattr(protocol, name, codes)
    if "weight" in texts:
        protocol.weight = np.array([float(text or 1) for text in texts["weight"]], dtype=np.float32)
    if points:
        protocol.landmarks = np.frombuffer(landmarks, dtype=np.float32).reshape(-1, 5, 2)
    check(protocol, path)
    beside = [path.with_name(f"{path.stem}.pairs{kind}") for kind in (path.suffix, ".csv", ".tsv", ".parquet")]
    listed = next((one for one in beside if one.is_file()), None)
    if pairs and listed is not None:
        protocol.pairs = _read_pairs(listed, protocol)
    return protocol


def write_protocol(
    path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]], pairs: Iterable[Sequence[Any]] | None = None
) -> None:
    """Writes the table ``path`` (.csv), and beside it its pairs: first, second, 0 or 1; both or, if it fails, none.

    ``columns`` are those of ``COLUMNS`` and of landmarks; ``rows`` and then ``pairs`` are gone through once.

    Raises:
        UsageError: a file exists, or its name does not end in .csv.
    """
    beside = path.with_name(f"{path.stem}.pairs.csv")
    if path.suffix != ".csv":
        raise UsageError(f"{path}: the name of a protocol ends in .csv")
    for one in (path, beside):
        if one.exists():
            raise UsageError(f"{one} exists already: name another file, or remove it first")
    make_folder(path.parent)
    with replacing(path) as table:
        write_csv(table, columns, rows)
        if pairs is not None:
            with replacing(beside) as unfinished:
                write_csv(unfinished, PAIR_COLUMNS, pairs)


def encode(texts: Sequence[str]) -> tuple[Codes, list[str]]:
    """Codes in the order in which the texts come, and the texts; −1 for an empty one."""
    places: dict[str, int] = {}
    codes = array("q", (places.setdefault(text, len(places)) if text else _NONE for text in texts))
    return np.frombuffer(codes, dtype=np.int64), list(places)


def check(protocol: Protocol, path: Path) -> None:
    """UsageError where the columns contradict each other."""
    roles, identity = protocol.role, protocol.identity
    distractor = roles == ROLES.index("distractor")
    wanted = np.unique(identity[~distractor])
    known = np.flatnonzero(distractor & (identity >= 0) & np.isin(identity, wanted))
    if len(known):
        row = int(known[0])
        name = printable(protocol.names["identity"][identity[row]])
        raise UsageError(
            f"{path}: {printable(protocol.images[row])} is a distractor of identity {name}, which is searched for"
        )
    searched, found = protocol.has("probe") or protocol.has("query"), protocol.has("gallery")
    if searched and not found and not protocol.has("distractor"):
        raise UsageError(f"{path} has probes or queries, but no gallery to find them in")
    if found and not searched:
        raise UsageError(f"{path} has a gallery, but no probe or query to find in it")
    if protocol.has("distractor") and not searched:
        raise UsageError(f"{path} has distractors, but no probe or query that they could be taken for")
    galleries = protocol.gallery
    if galleries is not None:
        unnamed = np.flatnonzero((roles == ROLES.index("gallery")) & (galleries < 0))
        if len(unnamed) and (galleries >= 0).any():
            row = protocol.images[int(unnamed[0])]
            raise UsageError(
                f"{path}: {printable(row)} is of a gallery without a name, beside others with one: name it"
            )
    if protocol.has("probe") and protocol.has("query"):
        raise UsageError(f"{path} has probes and queries: make a table of each")
    if protocol.template is None:
        return
    if (protocol.template < 0).any():
        row = int(np.argmin(protocol.template))
        raise UsageError(f"{path}: {printable(protocol.images[row])} has no template, as the others have")
    _, first, inverse = np.unique(protocol.template, return_index=True, return_inverse=True)
    for name in ("identity", "role", "camera", "gallery", "group"):
        codes = getattr(protocol, name)
        other = [] if codes is None else np.flatnonzero(codes != codes[first][inverse])
        if len(other):
            text = printable(protocol.names["template"][protocol.template[other[0]]])
            kind = {"identity": "identities", "gallery": "galleries"}.get(name, f"{name}s")
            raise UsageError(f"{path}: template {text} has two {kind}: a template is one person's, in one place")


def _read_pairs(path: Path, protocol: Protocol) -> Pairs:
    columns = columns_of(path)
    missing = [name for name in PAIR_COLUMNS if name not in columns]
    if missing:
        raise UsageError(f"{path} has no column {missing[0]}: pairs have {', '.join(PAIR_COLUMNS)}")
    of, names = "template", protocol.names.get("template")
    if names is None:
        of, names = "image", list(protocol.images)
    places = {name: place for place, name in enumerate(names)}
    if len(places) < len(names):
        twice = next(name for place, name in enumerate(names) if places[name] != place)
        raise UsageError(f"{path}: {printable(twice)} has two rows in the table: pairs of images need one of each")
    first, second, same = array("q"), array("q"), array("b")
    for where, one, other, flag in rows_of(path, *PAIR_COLUMNS):
        if str(flag) not in ("0", "1", "False", "True"):
            raise UsageError(f"{where}: same is {printable(str(flag))}: write 0 or 1")
        try:
            first.append(places[str(one)])
            second.append(places[str(other)])
        except KeyError as error:
            raise UsageError(f"{where}: {of} {printable(error.args[0])} has no image in the table") from None
        same.append(str(flag) in ("1", "True"))
    if not same:
        raise UsageError(f"{path} lists no pair: it is empty")
    flags = np.frombuffer(same, dtype=np.int8).astype(bool)
    return Pairs(np.frombuffer(first, dtype=np.int64), np.frombuffer(second, dtype=np.int64), flags)


def check_weight(where: str, text: str) -> None:
    """UsageError where it is no number from 0 on that float32 holds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= float(np.finfo(np.float32).max):
        raise UsageError(f"{where}: weight {printable(text)} is no number from 0 on")


def _row_alone(where: str) -> str:
    return where.rpartition(": ")[2]
