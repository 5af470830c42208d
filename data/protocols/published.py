"""Makes the table of a protocol from the folders and lists of published sets, as they are distributed.

Every function writes OUT.csv, and OUT.pairs.csv where there are pairs, and returns one line that says what is in it.
Images are named relative to the folder of OUT. UsageError where something is not as it should be, with file and line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ..alignment import LANDMARK_COLUMNS, parse_landmarks
from ..errors import UsageError
from ..images import SUFFIXES
from ..records.manifest import printable
from ..tables import columns_of, rows_of
from .made import fields_of, flag_of, relative, save
from .table import check_weight

_IJB_GALLERIES = {"IJBB": ("S1", "S2"), "IJBC": ("G1", "G2")}
_MARKET_NAME = re.compile(r"(-?\d+)_c(\d+)")  # 0001_c1s1_000151_01.jpg: identity 1, camera 1
_TINYFACE_NAME = re.compile(r"(\d+)_")


def ijb(folder: Path, out: Path, which: Literal["IJBB", "IJBC"]) -> str:
    """IJB-B or IJB-C as InsightFace packs them: 1:1 by templates, and 1:N where the three lists of it are there."""
    folder = _holding(folder, "meta", which)
    stem = which.lower()
    meta, crops = folder / "meta", relative(folder / "loose_crop", out)
    of_template, points, labels = (
        meta / f"{stem}_{name}.txt" for name in ("face_tid_mid", "name_5pts_score", "template_pair_label")
    )
    searches = _ijb_searches(meta, stem, _IJB_GALLERIES[which])
    templates = set()

    def rows() -> Iterator[Sequence[str]]:
        nothing = "", []
        one_by_one = zip_longest(
            fields_of(of_template, "image, template and media", 3),
            fields_of(points, "image, 10 coordinates and score", 12),
            fillvalue=nothing,
        )
        for (where, row), (there, other) in one_by_one:
            if not row or not other:
                longer, shorter = (where, points) if row else (there, of_template)
                raise UsageError(f"{longer} has no partner: {shorter} ends before: both list the same images")
            (image, template, media), (name, *numbers, score) = row, other
            if image != name:
                raise UsageError(f"{where}: image {printable(image)}, but {there}: {printable(name)}")
            parse_landmarks(there, numbers)
            check_weight(there, score)
            templates.add(template)
            found = searches.get(template, ("", "", ""))
            yield f"{crops}/{name}", template, media, score, *numbers, *(found if searches else ())

    def pairs() -> Iterator[Sequence[Any]]:
        for where, (first, second, same) in fields_of(labels, "template, template, 0 or 1", 3):
            if first not in templates or second not in templates:
                missing = printable(second if first in templates else first)
                raise UsageError(f"{where}: template {missing} has no image in {of_template}")
            yield first, second, flag_of(where, same)

    columns = ("image", "template", "media", "weight", *LANDMARK_COLUMNS)
    return save(folder, out, (*columns, *(("role", "gallery", "identity") if searches else ())), rows(), pairs())


def _ijb_searches(meta: Path, stem: str, galleries: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Template → role, gallery and identity, by the lists of the 1:N protocol; empty where there are none."""
    lists = {meta / f"{stem}_1N_gallery_{name}.csv": ("gallery", name) for name in galleries}
    lists[meta / f"{stem}_1N_probe_mixed.csv"] = ("probe", "")
    missing = [path for path in lists if not path.exists()]
    if len(missing) == len(lists):
        return {}
    found: dict[str, tuple[str, str, str]] = {}
    for path, (role, gallery) in lists.items():
        there = [] if path in missing else columns_of(path)
        if not {"TEMPLATE_ID", "SUBJECT_ID"} <= set(there):
            what = "is missing" if path in missing else "has no columns TEMPLATE_ID and SUBJECT_ID"
            raise UsageError(f"{path} {what}: bring it as it was published, or remove the other 1N lists too")
        for where, template, subject in rows_of(path, "TEMPLATE_ID", "SUBJECT_ID"):
            if found.setdefault(template, (role, gallery, subject)) != (role, gallery, subject):
                raise UsageError(f"{where}: template {printable(template)} was of another role, list or subject before")
    return found


def market(folder: Path, out: Path) -> str:
    """Market-1501, and what is named like it: ``query`` and ``bounding_box_test``, without the junk images."""
    folder = _holding(folder, "query")

    def rows() -> Iterator[Sequence[str]]:
        for name, role in (("query", "query"), ("bounding_box_test", "gallery")):
            place = relative(folder / name, out)
            for image in _images(folder / name):
                text, camera = _matched(_MARKET_NAME, folder / name / image, "0001_c1s1_000151_01.jpg")
                identity = int(text)
                if identity > 0:
                    yield f"{place}/{image}", str(identity), camera, role
                elif identity == 0:
                    yield f"{place}/{image}", "", camera, "distractor"

    return save(folder, out, ("image", "identity", "camera", "role"), rows())


def sop(folder: Path, out: Path) -> str:
    """Stanford Online Products: the test images of ``Ebay_test.txt``, each searched for among all others."""
    folder = _holding(folder, "Ebay_test.txt")
    place = relative(folder, out)

    def rows() -> Iterator[Sequence[str]]:
        for _, (image, identity, _, path) in fields_of(
            folder / "Ebay_test.txt", "image_id class_id super_class_id path", 4
        ):
            if image != "image_id":
                yield f"{place}/{path}", identity

    return save(folder, out, ("image", "identity"), rows())


def tinyface(folder: Path, out: Path) -> str:
    """TinyFace: the folders ``Probe``, ``Gallery_Match`` and ``Gallery_Distractor`` of its ``Testing_Set``."""
    folder = _holding(folder, "Probe")

    def rows() -> Iterator[Sequence[str]]:
        for name, role in (("Probe", "probe"), ("Gallery_Match", "gallery"), ("Gallery_Distractor", "distractor")):
            place = relative(folder / name, out)
            for image in _images(folder / name):
                identity = ""
                if role != "distractor":
                    identity = str(int(_matched(_TINYFACE_NAME, folder / name / image, "17_2.jpg")[0]))
                yield f"{place}/{image}", identity, role

    return save(folder, out, ("image", "identity", "role"), rows())


def megaface(folder: Path, out: Path, probes: Path, distractors: Path) -> str:
    """MegaFace: probes, such as FaceScrub's, among distractors; two lists as its development kit has them."""

    def rows() -> Iterator[Sequence[str]]:
        for path, role in ((probes, "probe"), (distractors, "distractor")):
            images, identities = _megaface_list(path)
            place = relative(_holding(folder, images[0]), out)
            for number, image in enumerate(images):
                identity = ""
                if role == "probe":
                    identity = str(identities[number]) if identities else PurePosixPath(image).parent.name
                    if not identity:
                        what = "has no id, and is in no folder that could be its identity's"
                        raise UsageError(f"{path}: path {number}: {printable(image)} {what}")
                yield f"{place}/{image}", identity, role

    return save(folder, out, ("image", "identity", "role"), rows())


def _megaface_list(path: Path) -> tuple[list[str], list[Any]]:
    """Paths, and identities or nothing."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or '').lower()}; check the path") from None
    except ValueError as error:
        raise UsageError(f"{path} is no JSON: {error}") from None
    images = content.get("path") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise UsageError(f'{path} is no list of MegaFace: it is {{"path": [...], "id": [...]}}, with a path at least')
    identities = content.get("id") or []
    if identities and (not isinstance(identities, list) or len(identities) != len(images)):
        raise UsageError(f"{path} has {len(images):,} paths, and not as many ids")
    return images, identities


def _holding(folder: Path, wanted: str, *below: str) -> Path:
    """``folder``, one of its sub-folders, or the one named in ``below``, whichever has ``wanted`` in it."""
    inside = [folder / name for name in below]
    if folder.is_dir() and not below:
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    for place in (folder, *inside):
        if (place / wanted).exists():
            return place
    raise UsageError(
        f"{folder} holds no {printable(wanted)}, and no sub-folder of it does: give the folder that has it"
    )


def _images(folder: Path) -> list[str]:
    """All image files under the folder, in order, relative to it."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; check that the set was unpacked completely")
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _matched(pattern: re.Pattern[str], path: Path, example: str) -> Sequence[str]:
    found = pattern.match(path.name)
    if found is None:
        raise UsageError(f"{printable(str(path))}: its name does not say who it is, as {example} does: remove it")
    return found.groups()
