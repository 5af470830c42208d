"""Rebuilds a lost ``.idx`` from its ``.rec`` alone."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..atomic import replacing
from ..errors import UsageError
from ..records.recordio import ImageRecord, RecordFile, unpack_image
from ..workers import Progress

_NO_ID = -1
_LARGEST = 1 << 62  # larger ids are not distinguished
_SMALLEST = 32  # bytes of an image record without an image


class Rebuilt(NamedTuple):
    """A rebuilt index: its ``records``, and at how many places the ``.rec`` is damaged."""

    idx: Path
    records: int
    damaged: int

    def __str__(self) -> str:
        return f"wrote {self.idx}: {self.records:,} records, {self.damaged:,} damaged place(s) among them"


def rebuild_index(path: str | Path, *, force: bool = False, progress: Progress | None = None) -> list[Rebuilt]:
    """Write the ``.idx`` of the ``.rec`` at ``path``, or of those in the directory ``path`` that have none.

    The keys are the records' own ids, where these differ from each other as MXNet's tools and pfc write them;
    otherwise they count from 0 in the order of the file. A damaged stretch is skipped up to the next record that is
    whole, and listed under the keys that are missing there, so that nothing is lost silently: reading these keys is an
    error that names them. An index that exists is replaced with ``force`` only, when the new one is complete. progress
    counts bytes.

    Raises:
        UsageError: there is no ``.rec``; all have their index and ``force`` is not given; a file has no record.
    """
    path = Path(path)
    recs = sorted(path.glob("[!.]*.rec")) if path.is_dir() else [path]  # not the ._NAME.rec that macOS leaves
    if not recs or not recs[0].is_file():
        raise UsageError(f"{path}: no .rec file to make an index for; check the path")
    lost = [rec for rec in recs if force or not rec.with_suffix(".idx").exists()]
    if not lost:
        there = ", ".join(rec.with_suffix(".idx").name for rec in recs[:3])
        raise UsageError(f"{path}: {there} exists already: --force replaces it")
    total, done = sum(rec.stat().st_size for rec in lost), 0
    made: list[Rebuilt] = []
    for rec in lost:
        made.append(_rebuild(RecordFile(rec), progress, done, total))
        done += rec.stat().st_size
    return made


def _rebuild(file: RecordFile, progress: Progress | None, done: int, total: int) -> Rebuilt:
    starts, found_ids = array("q"), array("q")
    header: ImageRecord | None = None
    for offset, end, payload in file.walk():
        record = _unpack(payload)
        if not starts and record is not None and record.flag and not len(record.image):
            header = record
        starts.append(offset)
        found_ids.append(_NO_ID if record is None else min(record.id, _LARGEST))
        if progress is not None and (len(starts) % 4096 == 0 or end == file.size):
            progress(done + end, total)
    ids, offsets = (np.frombuffer(numbers, dtype=np.int64) for numbers in (found_ids, starts))
    damaged = int(np.sum(ids == _NO_ID))
    if damaged == len(ids):
        raise UsageError(f"{file.path} holds not one whole record: copy or pack it again")
    given = ids[ids != _NO_ID]
    if 4 * len(np.unique(given)) > 3 * len(given) and not _ends_with_doubles(given):
        keys, places = _by_id(ids, np.append(offsets[1:], file.size) - offsets)
        offsets = offsets[places]
        if (
            header is not None and header.labels[0] in keys[: len(ids)]
        ):  # images that are lost without a trace of damage
            missing = np.setdiff1d(np.arange(1, int(header.labels[0])), keys)
            keys = np.append(keys, missing)
            offsets = np.append(offsets, np.full(len(missing), file.size))
    else:
        keys = np.arange(len(ids))
    idx = file.path.with_suffix(".idx")
    try:
        with replacing(idx) as unfinished, unfinished.open("w", encoding="ascii", newline="\n") as out:
            out.writelines(f"{keys[i]}\t{offsets[i]}\n" for i in map(int, np.argsort(keys, kind="stable")))
    except OSError as error:
        raise UsageError(f"{idx} cannot be written: {error}") from None
    return Rebuilt(idx, len(keys), damaged)


def _ends_with_doubles(given: np.ndarray) -> bool:
    """Whether the last two ids ascend and stand further ahead, too: as in a file that was joined from others."""
    return len(given) > 2 and bool(given[-2] < given[-1] and np.isin(given[-2:], given[:-2]).all())


def _unpack(payload: np.ndarray | None) -> ImageRecord | None:
    try:
        return None if payload is None else unpack_image(payload)
    except ValueError:
        return None


def _by_id(ids: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys, and the entry of ``ids`` (in the file's order) that each belongs to: the ids, and those missing between.

    ``sizes``: bytes of the entries, which bound how many records a damaged stretch may have held.
    """
    step = _step(ids[ids != _NO_ID])
    ids = ids.copy()
    ids[_misfits(ids, step)] = _NO_ID
    kept = np.flatnonzero(ids != _NO_ID)
    taken = np.sort(ids[kept])
    keys, places = [ids[kept]], [kept]
    lost = np.flatnonzero(ids == _NO_ID)
    for run in np.split(lost, np.flatnonzero(np.diff(lost) > 1) + 1):
        if not len(run):
            continue
        between = _between(ids, int(run[0]), int(run[-1]), step)
        between = between[: len(run) + int(sizes[run].sum()) // _SMALLEST]
        missing = [key for key in between if key < _LARGEST and not _holds(taken, key)]
        keys.append(np.array(missing, dtype=np.int64))
        places.append(run[np.minimum(np.arange(len(missing)), len(run) - 1)])
    once, first = np.unique(np.concatenate(keys), return_index=True)
    return once, np.concatenate(places)[first]


def _step(given: np.ndarray) -> int:
    """How far one id is from the next: what most of them are apart, if three in four stand in one such row; else 1."""
    steps, counts = np.unique(np.diff(given), return_counts=True)
    step = int(steps[counts.argmax()]) if len(steps) else 1
    if step < 1:
        return 1
    in_row = np.unique(given % step, return_counts=True)[1].max()
    return step if 4 * int(in_row) >= 3 * len(given) else 1


def _misfits(ids: np.ndarray, step: int) -> np.ndarray:
    """Entries whose id must be wrong: another's, off the even ``step``, or far out of an ascent that others keep."""
    kept = np.flatnonzero(ids != _NO_ID)
    given = ids[kept]
    odd = np.zeros(len(given), dtype=bool)
    before, here, after = given[:-2], given[1:-1], given[2:]
    odd[1:-1] = (before < after) & ((here <= before) | (here >= after))
    ranks = np.argsort(np.argsort(given, kind="stable"))
    adjacent = np.zeros(len(given), dtype=np.int64)  # neighbours that are one step away
    adjacent[1:] += given[1:] - given[:-1] == step
    adjacent[:-1] += given[1:] - given[:-1] == step
    # Of equal ids, the one adjacent to its neighbours comes first, then the one in its place.
    order = np.lexsort((np.abs(ranks - np.arange(len(given))), -adjacent, given))
    double = np.zeros(len(given), dtype=bool)
    double[order[1:]] = given[order[1:]] == given[order[:-1]]
    rests, counts = np.unique(given % step, return_counts=True)
    off = given % step != rests[counts.argmax()]
    if odd.all():
        return kept[double | off]
    lost = step * (len(ids) - len(kept) + int(odd.sum()))  # a whole record may have been moved into another's place
    low, high = int(given[~odd].min()) - lost, min(int(given[~odd].max()) + lost, _LARGEST)
    far = (given < max(low, 0)) | (given > high)
    return kept[double | off | (odd & far)]


def _between(ids: np.ndarray, first: int, last: int, step: int) -> range:
    """The keys that are missing at the entries [first, last], all of them without an id."""
    before = int(ids[first - 1]) if first else None
    after = int(ids[last + 1]) if last + 1 < len(ids) else None
    if after is None:  # how many the end of the file had, nothing says
        return range(before + step, before + step + 1) if before is not None else range(0)
    return range(after % step if before is None else before + step, after, step)


def _holds(ascending: np.ndarray, key: int) -> bool:
    at = int(np.searchsorted(ascending, key))
    return at < len(ascending) and int(ascending[at]) == key
