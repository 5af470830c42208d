"""Makes the table of a protocol from a packed set or from a list of trials; ``published`` makes it from published sets.

Every function writes OUT.csv, and OUT.pairs.csv where there are pairs, and returns one line that says what is in it.
Images are named relative to the folder of OUT. UsageError where something is not as it should be, with file and line.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..records.dataset import RecordDataset
from ..records.manifest import printable
from .table import write_protocol

_SAME = {"target": 1, "nontarget": 0, "1": 1, "0": 0}


def records(
    source: Path,
    out: Path,
    *,
    gallery_images: int = 1,
    non_mated: float = 0.5,
    distractors: Sequence[Path] = (),
    most_distractors: int | None = None,
    retrieval: bool = False,
    seed: int = 0,
) -> str:
    """Identification among the images of a packed set, or retrieval.

    Args:
        gallery_images: of each identity in the gallery; its other images are probes.
        non_mated: the share of identities that are not in the gallery: all of their images are probes.
        distractors: packed sets of other identities, of which at most ``most_distractors`` images join the gallery.
        retrieval: no roles: each image is searched for among all others.
        seed: of every choice.
    """
    if retrieval and distractors:
        raise UsageError("distractors belong to identification: leave them out, or the retrieval")
    if gallery_images < 1 or not 0 <= non_mated < 1:
        raise UsageError("an identity has at least 1 image in the gallery, and a share below 1 of them is not there")
    for place, one in enumerate(distractors):
        if one.resolve() in [source.resolve(), *(other.resolve() for other in distractors[:place])]:
            raise UsageError(f"{one} is given twice: name every set once")
    dataset, others = RecordDataset.open(source), [RecordDataset.open(one) for one in distractors]
    labels, names = dataset.labels(), dataset.identity_names()
    random = np.random.default_rng(seed)
    roles = None if retrieval else _roles(source, labels, gallery_images, non_mated, random)
    ends = np.cumsum([len(one) for one in others], dtype=np.int64)
    chosen = np.arange(ends[-1] if others else 0)
    if most_distractors is not None and most_distractors < len(chosen):
        chosen = np.sort(random.choice(len(chosen), most_distractors, replace=False))

    def rows() -> Iterator[Sequence[str]]:
        place = relative(source, out)
        for number, label in enumerate(labels.tolist()):
            identity = (names[label] if names is not None and label < len(names) else "") or str(label)
            yield f"{place}#{number}", identity, *([] if roles is None else [roles[number]])
        for which, start, stop in zip(distractors, [0, *ends], ends, strict=False):
            place = relative(which, out)
            for number in (chosen[(chosen >= start) & (chosen < stop)] - start).tolist():
                yield f"{place}#{number}", "", "distractor"

    return save(source, out, ("image", "identity") if retrieval else ("image", "identity", "role"), rows())


def _roles(
    source: Path, labels: np.ndarray, gallery_images: int, non_mated: float, random: np.random.Generator
) -> list[str]:
    """Of every image."""
    identities, identity, counts = np.unique(labels, return_inverse=True, return_counts=True)
    left_out = np.zeros(len(identities), dtype=bool)
    left_out[random.permutation(len(identities))[: round(non_mated * len(identities))]] = True
    if not (counts[~left_out] > gallery_images).any():
        raise UsageError(
            f"{source}: no identity in the gallery has more than {gallery_images} image(s), so there is nothing to "
            "find: fewer gallery images, or a smaller share of non-mated identities"
        )
    order = random.permutation(len(labels))
    order = order[np.argsort(identity[order], kind="stable")]  # identity by identity, at random in each
    number = np.empty(len(labels), dtype=np.int64)
    number[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.where((number < gallery_images) & ~left_out[identity], "gallery", "probe").tolist()


def trials(source: Path, out: Path) -> str:
    """Verification of speakers: lines ``enroll test target|nontarget``, or ``1|0 enroll test`` as VoxCeleb has them."""
    places: dict[str, int] = {}
    codes = array("q")
    for where, fields in fields_of(source, "enroll, test, target or nontarget", 3):
        if fields[2] not in _SAME and fields[0] in _SAME:
            fields = [*fields[1:], fields[0]]
        first, second, same = fields
        codes.extend(
            (places.setdefault(first, len(places)), places.setdefault(second, len(places)), flag_of(where, same))
        )
    names = list(places)
    pairs = ((names[codes[at]], names[codes[at + 1]], codes[at + 2]) for at in range(0, len(codes), 3))
    return save(source, out, ("image",), zip(names, strict=True), pairs)


def save(
    source: Path,
    out: Path,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    pairs: Iterable[Sequence[Any]] | None = None,
) -> str:
    """Writes the protocol of ``source`` and says what is in it; UsageError where that is nothing."""
    roles: Counter[str] = Counter()
    same: Counter[int] = Counter()
    role = columns.index("role") if "role" in columns else None

    def counted() -> Iterator[Sequence[str]]:
        for row in rows:
            roles["" if role is None else row[role]] += 1
            yield row
        if not roles:
            raise UsageError(f"{source} lists no image: it is empty")

    def counted_pairs() -> Iterator[Sequence[Any]]:
        for pair in pairs or ():
            same[pair[2]] += 1
            yield pair
        if not same:
            raise UsageError(f"{source} lists no pair: bring its list of pairs")

    write_protocol(out, columns, counted(), None if pairs is None else counted_pairs())
    told = [f"{count:,} {name}" for name, count in roles.items() if name]
    line = f"wrote {roles.total():,} images" + (f" ({', '.join(told)})" if told else "")
    if pairs is not None:
        line += f" and {same.total():,} pairs, {same[1]:,} of them matching"
    return f"{line}: {out}"


def relative(path: Path, out: Path) -> str:
    """``path`` as seen from the folder of ``out``."""
    return os.path.relpath(os.path.abspath(path), os.path.realpath(out.parent))


def fields_of(path: Path, what: str, number: int) -> Iterator[tuple[str, list[str]]]:
    """(where, the fields between blanks) of each line that is not empty; UsageError unless they are ``number``."""
    try:
        file = path.open(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or '').lower()}; check the path") from None
    with file:
        for line, text in enumerate(file, 1):
            fields = text.split()
            if fields and len(fields) != number:
                raise UsageError(f"{path}: line {line} has {len(fields)} fields where {what} are wanted")
            if fields:
                yield f"{path}: line {line}", fields


def flag_of(where: str, text: str) -> int:
    if text not in _SAME:
        raise UsageError(f"{where}: {printable(text)} does not say whether both are one: write 1 or 0")
    return _SAME[text]
