"""Random damage to a ``.rec`` and its ``.idx``: nothing crashes, nothing gets another's label, nothing good is lost.

    python -m tests.data.checking.fuzz 10000

Every round writes damage of one to three kinds into a copy of a small data set, and holds this against what is read:

- a record whose bytes and index line are as they were is read exactly;
- whatever else is read under a key differs from that key's image and label only if that record's own bytes were
  changed: no image ever gets another one's label, and where ids are keys no key another one's image;
- a data set that is refused is refused with a UsageError, in one line;
- an index made anew from the damaged ``.rec`` finds every record whose bytes are all still there.
"""

# ruff: noqa: PT017 -- these assertions say more than pytest.raises could

from __future__ import annotations

import io
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pfc.data.checking.rebuild import rebuild_index
from pfc.data.errors import DamagedRecord, UsageError
from pfc.data.loading.plain import PlainRecords
from pfc.data.records.dataset import RecordDataset
from pfc.data.records.recordio import MAGIC_BYTES, RecordWriter, pack_image

_IMAGES = 24


class Original:
    """A data set of one shard, as MXNet's im2rec or as InsightFace lays it out, and all that is true about it."""

    def __init__(self, folder: Path, *, insightface: bool, ids: bool) -> None:
        self.ids = ids
        records: list[bytes] = []
        self.truth: dict[int, tuple[int, bytes]] = {}
        if insightface:
            records.append(pack_image([_IMAGES + 1.0, _IMAGES + 3.0], b""))
        for label in sorted(i % 2 for i in range(_IMAGES)):
            key = len(records)
            image = _picture(key)
            self.truth[key] = (label, image)
            stored = [float(label), 5.0] if key % 5 == 3 else float(label)
            records.append(pack_image(stored, image, id=key if ids else 0))
        if insightface:
            half = _IMAGES // 2
            records += [
                pack_image([1.0, half + 1.0], b"", id=len(records) if ids else 0),
                pack_image([half + 1.0, _IMAGES + 1.0], b"", id=len(records) + 1 if ids else 0),
            ]
        with RecordWriter(folder / "a.rec") as writer:
            self.offsets = [writer.write(key, record) for key, record in enumerate(records)]
        self.rec = (folder / "a.rec").read_bytes()
        self.idx = (folder / "a.idx").read_bytes()
        self.ends = [*self.offsets[1:], len(self.rec)]

    def stored(self, key: int) -> bytes:
        return self.rec[self.offsets[key] : self.ends[key]] if 0 <= key < len(self.ends) else b"none"


def _picture(key: int) -> bytes:
    """A small PNG or JPEG, no two alike; some hold the magic, at a multiple of 4 in the record or elsewhere."""
    out = io.BytesIO()
    picture = Image.new("RGB", (1 + key % 5, 1 + key % 3), (7 * key % 256, key, 255 - key))
    if key % 2:
        picture.save(out, "PNG")
        return out.getvalue()
    comment = key.to_bytes(2, "little") * (1 + key % 4) + MAGIC_BYTES * (key % 3) + bytes(key % 4)
    picture.save(out, "JPEG", comment=comment)
    return out.getvalue()


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 3, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(1, len(data)) :]


def insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice((rng.randbytes(rng.choice((1, 3, 4, 64))), MAGIC_BYTES, bytes(16), b"\n", b"7\t0\n"))


def delete(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 2, 4, 40, 200))]


def swap_blocks(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((4, 8, 64, 200))
    a, b = (rng.randrange(max(4, len(data) - size)) // 4 * 4 for _ in range(2))
    if abs(a - b) >= size:
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def overwrite(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    new = rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(30)))[: len(data) - at]
    data[at : at + len(new)] = new


def shuffle_lines(data: bytearray, rng: random.Random) -> None:
    lines = bytes(data).splitlines(keepends=True)
    a, b = (rng.randrange(len(lines)) for _ in range(2))
    match rng.randrange(4):
        case 0:
            lines[a], lines[b] = lines[b], lines[a]
        case 1:
            lines[a] = lines[a].split(b"\t")[0] + b"\t" + lines[b].split(b"\t")[-1]  # another's offset
        case 2:
            lines[a] = rng.choice((b"\n", b"x\ty\n", b"-1\t-1\n", b"5\t1e9\n", b"\xff\xfe\t\n", lines[b]))
        case 3:
            del lines[a]
    data[:] = b"".join(lines) or b"\n"


_OF_REC: list[Callable[[bytearray, random.Random], None]] = [
    flip_bits, truncate, insert, delete, swap_blocks, overwrite,
]  # fmt: skip
_OF_IDX = [*_OF_REC, shuffle_lines, shuffle_lines, shuffle_lines]


def fuzz_once(original: Original, folder: Path, rng: random.Random) -> str:
    """One round in ``folder``; returns "read", "reported" or "refused", whatever came out. AssertionError if wrong."""
    rec, idx = bytearray(original.rec), bytearray(original.idx)
    for _ in range(rng.choice((1, 1, 2, 3))):
        data, ways = (rec, _OF_REC) if rng.random() < 0.7 else (idx, _OF_IDX)
        if len(data) > 1:
            rng.choice(ways)(data, rng)
    (folder / "a.rec").write_bytes(rec)
    (folder / "a.idx").write_bytes(idx)
    unchanged = {
        key
        for key in original.truth
        if rec[original.offsets[key] : original.ends[key]] == original.stored(key)
        and original.idx.splitlines()[key] in bytes(idx).splitlines()
    }
    outcome = _check(original, folder, unchanged)

    (folder / "a.idx").unlink()
    kept = {key for key in original.truth if _stands_free(original, bytes(rec), key)}
    try:
        rebuild_index(folder)
    except UsageError as error:
        assert "\n" not in str(error)
        assert not kept, f"no index, but the records {sorted(kept)} are whole: {error}"
        return outcome
    again = _check(original, folder, kept if original.ids else set(), strict=False)
    if again == "refused" and not kept:  # a header record alone
        return outcome
    assert again != "refused", "rebuilt, and refused"
    found = _readable(folder)
    for key in kept:
        assert original.truth[key] in found, f"record {key} is whole, and the index made anew does not find it"
    return outcome


def _check(original: Original, folder: Path, unchanged: set[int], *, strict: bool = True) -> str:
    try:
        dataset = RecordDataset.open(folder, strict=strict)
    except UsageError as error:
        assert "\n" not in str(error), error
        return "refused"
    outcome, seen = "read", set()
    for i in range(len(dataset)):
        shard, position = dataset.locate(i)
        key, offset = int(shard.keys[position]), int(shard.offsets[position])
        try:
            label, image = dataset.read(i)
        except DamagedRecord as error:
            assert (error.key, error.offset, "\n" in str(error)) == (key, offset, False)
            assert key not in unchanged, f"record {key} is as it was, but: {error}"
            outcome = "reported"
            continue
        seen.add(key)
        if key in unchanged:
            assert (label, image.tobytes()) == original.truth[key], f"record {key} is as it was, but reads otherwise"
        elif (own := _whose(original, image.tobytes())) is not None:
            stored = shard.file.bytes[offset : offset + shard.length(position)].tobytes()
            if stored == original.stored(own):
                assert label == original.truth[own][0], f"the image of {own} got another label"
                assert key == own or not original.ids, f"key {key} reads the image of {own}"
    assert unchanged <= seen or len(dataset) < len(original.truth), f"records {unchanged - seen} were not read"
    labels = dataset.labels(damaged=-1)
    plain = PlainRecords(dataset).find(np.arange(len(dataset)))
    for i in range(len(dataset)):
        try:
            label, image = dataset.read(i)
        except DamagedRecord as error:
            assert plain.labels[i] < 0, f"the compiled pass takes what is damaged: {error}"
            continue
        assert labels[i] == label
        if plain.labels[i] >= 0:
            assert (plain.labels[i], plain[i].tobytes()) == (label, image.tobytes())
    return outcome


def _stands_free(original: Original, rec: bytes, key: int) -> bool:
    """Whether the record is in ``rec`` with all its bytes, and where a reader may look for it.

    A block that was moved may lie within another record. There it is found at multiples of 4 only, where the format
    promises that no payload holds the magic; so not where other damage has shifted what it lies in.
    """
    stored = original.stored(key)
    two = original.stored(key - 1) + stored, stored + original.stored(key + 1)
    return any(both in rec for both in two) or (stored in rec and len(rec) == len(original.rec))


def _whose(original: Original, image: bytes) -> int | None:
    return next((key for key, (_, true) in original.truth.items() if true == image), None)


def _readable(folder: Path) -> set[tuple[int, bytes]]:
    dataset = RecordDataset.open(folder, strict=False)
    found: set[tuple[int, bytes]] = set()
    for i in range(len(dataset)):
        try:
            label, image = dataset.read(i)
        except DamagedRecord:
            continue
        found.add((label, image.tobytes()))
    return found


def fuzz(rounds: int, folder: Path, *, seed: int = 0) -> Counter[str]:
    """That many rounds; how many ended how. AssertionError names the first round that went wrong."""
    originals: list[Original] = []
    for number in range(4):
        place = folder / f"original-{number}"
        place.mkdir()
        originals.append(Original(place, insightface=bool(number & 1), ids=bool(number & 2)))
    outcomes: Counter[str] = Counter()
    damaged = folder / "damaged"
    damaged.mkdir()
    for number in range(rounds):
        rng = random.Random(f"{seed} {number}")
        try:
            outcomes[fuzz_once(originals[number % 4], damaged, rng)] += 1
        except Exception as error:
            raise AssertionError(f"round {number} of seed {seed}: {type(error).__name__}: {error}") from error
    return outcomes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
        print(dict(fuzz(rounds, Path(place), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
