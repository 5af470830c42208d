"""The index: parsed once, cached as arrays next to the .idx, mapped and shared; rebuilt when it must be, never believed
when damaged; and rebuilt from a .rec alone."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pfc.data.checking.rebuild import rebuild_index
from pfc.data.errors import DamagedRecord, UsageError
from pfc.data.packing.writer import ShardedWriter
from pfc.data.records.cache import load_arrays, store_arrays
from pfc.data.records.dataset import RecordDataset
from pfc.data.records.index import load_index
from pfc.data.records.recordio import RecordWriter, pack_image
from pfc.launch.cli import main

RECORDS = 20_000  # enough for an index that is worth caching


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "pfc"


def write(folder: Path, keys: list[int] | range = range(RECORDS)) -> Path:
    """A data set without dataset.json, whose files look as if they were old."""
    folder.mkdir()
    with RecordWriter(folder / "a.rec") as writer:
        for key in keys:
            writer.write(key, pack_image(float(key % 7), b"%d\xff\xd9" % key, id=key))
    grow_old(folder)
    return folder


def grow_old(folder: Path) -> None:
    for path in (folder / "a.rec", folder / "a.idx"):
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**10))


def check(folder: Path, keys: list[int] | range = range(RECORDS)) -> None:
    ds = RecordDataset.open(folder)
    ordered = sorted(keys)
    assert [int(key) for key in ds.shards[0].keys] == ordered
    assert ds.labels().tolist() == [key % 7 for key in ordered]
    for i in (0, 1, len(ds) // 2, len(ds) - 1):
        assert ds.read(i)[1].tobytes() == b"%d\xff\xd9" % ordered[i]


def mapped(array: np.ndarray) -> bool:
    """Whether the array is a view of a mapped file, not memory of this process."""
    address = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        first, stop = (int(number, 16) for number in span.split("-"))
        if first <= address < stop:
            return bool(name) and name[0].endswith(".cache")
    return False


@pytest.mark.parametrize(
    "keys",
    [
        range(RECORDS),
        range(3, 3 + 8 * RECORDS, 8),
        np.random.default_rng(0).permutation(RECORDS).tolist(),
        np.random.default_rng(0).permutation(5 * RECORDS)[:RECORDS].tolist(),
    ],
    ids=["from 0", "evenly spaced", "shuffled", "some of them"],
)
def test_the_cache_gives_what_the_text_says(home: Path, tmp_path: Path, keys: list[int] | range) -> None:
    folder = write(tmp_path / "s", keys)
    check(folder, keys)
    assert sorted(path.name for path in folder.iterdir()) == ["a.idx", "a.idx.2.cache", "a.rec", "labels.3.cache"]
    (folder / "a.idx").chmod(0)  # nothing but the cache can tell now
    check(folder, keys)
    assert not home.exists()


def test_a_record_costs_16_bytes_at_most_and_nothing_of_them_is_private(home: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "s", np.random.default_rng(0).permutation(5 * RECORDS)[:RECORDS].tolist())
    RecordDataset.open(folder).labels()
    sizes = [(folder / name).stat().st_size for name in ("a.idx.2.cache", "labels.3.cache")]
    assert sum(sizes) <= 16 * RECORDS + 2048
    ds = RecordDataset.open(folder)
    keys, offsets = ds.shards[0].keys, ds.shards[0].offsets
    assert all(mapped(array) for array in (np.asarray(keys), offsets, ds.labels()))
    assert not mapped(np.zeros(3))


def test_opening_a_million_records_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """Measured in a process of its own: the heap's peak while a data set of 10⁶ records opens from its cache."""
    records = 1_000_000
    with (tmp_path / "a.rec").open("wb") as file:
        file.truncate(64 * records)  # sparse: the records that opening looks at are written, the others are holes
        for position in np.unique(np.linspace(0, records - 1, 16).astype(np.int64)).tolist():
            file.seek(64 * position)
            file.write(struct.pack("<II", 0xCED7230A, 56) + pack_image(1.0, b"x" * 32, id=position))
    numbers = np.stack([np.arange(records), np.arange(records) * 64], axis=1)
    np.savetxt(tmp_path / "a.idx", numbers, fmt="%d", delimiter="\t")
    grow_old(tmp_path)
    code = (
        "import sys, tracemalloc\n"
        "from pfc.data import RecordDataset\n"
        "RecordDataset.open(sys.argv[1])\n"
        "tracemalloc.start()\n"
        "ds = RecordDataset.open(sys.argv[1])\n"
        "print(len(ds), tracemalloc.get_traced_memory()[1])\n"
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    count, peak = map(int, out.stdout.split())
    assert count == records
    assert peak < records / 4  # bytes: no array of one byte a record, not even for a moment
    assert (tmp_path / "a.idx.2.cache").stat().st_size < 8 * records + 1024


@pytest.mark.parametrize("name", ["a.idx", "a.rec"])
def test_a_changed_file_makes_the_cache_anew(home: Path, tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "s")
    check(folder)
    before = (folder / "a.idx.2.cache").stat().st_ino
    if name == "a.idx":
        lines = (folder / name).read_text().splitlines(keepends=True)
        lines[5], lines[6] = "5\t" + lines[6].split("\t")[1], "6\t" + lines[5].split("\t")[1]
        (folder / name).write_text("".join(lines))
    else:
        stored = bytearray((folder / name).read_bytes())
        stored[12:16] = struct.pack("<f", 3.0)  # the first record's label
        (folder / name).write_bytes(stored)
    os.utime(folder / name, ns=(0, 10**18 + 1))
    ds = RecordDataset.open(folder)
    assert (folder / "a.idx.2.cache").stat().st_ino != before
    if name == "a.idx":
        with pytest.raises(DamagedRecord, match=r"key 5 .* says that it is key 6"):
            ds.read(5)
        assert ds.labels(damaged=-1)[:8].tolist() == [0, 1, 2, 3, 4, -1, -1, 0]
    else:
        assert ds.labels()[0] == ds.read(0)[0] == 3


def test_a_file_that_has_just_been_written_is_not_cached(home: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    (folder / "a.idx").touch()  # it might change again without a new time
    check(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["a.idx", "a.rec"]


@pytest.mark.parametrize("name", ["a.idx.2.cache", "labels.3.cache"])
def test_a_damaged_cache_is_never_believed(home: Path, tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "s")
    check(folder)
    good = (folder / name).read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(0, 300, 7), *rng.integers(0, len(good), 10).tolist()]
    damaged = [good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :] for at in places]
    damaged += [b"", good[:7], good[:40], good[: len(good) // 2], good[:-1], good + b"\0", b"x" * 1000]
    damaged += [bytes(1), bytes(4)]
    for stored in damaged:
        (folder / name).write_bytes(stored)
        load = _index if name == "a.idx.2.cache" else _labels
        assert load(folder) == ([5, 6, 7, 8] if name == "a.idx.2.cache" else [5, 6, 0, 1])
        assert (folder / name).read_bytes() == good


def _index(folder: Path) -> list[int]:
    return list(load_index(folder / "a.rec", folder / "a.idx")[0][5:9])


def _labels(folder: Path) -> list[int]:
    return RecordDataset.open(folder).labels()[5:9].tolist()


def test_a_folder_that_cannot_be_written_has_its_cache_with_the_user(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "s")
    for name in ("a.idx.2.cache", "labels.3.cache"):
        (folder / name).mkdir()  # in the way, for root too
    check(folder)
    assert len(list(home.iterdir())) == 2
    ds = RecordDataset.open(folder)
    assert mapped(ds.shards[0].offsets)
    assert mapped(ds.labels())
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "a.rec"))  # no folder, so there is no place at all
    check(folder)


def test_arrays_of_another_origin_are_not_taken(tmp_path: Path) -> None:
    about = {"of": "this"}
    kept = store_arrays(tmp_path / "x", about, [np.arange(5), np.empty(0, dtype=np.uint32)])
    assert kept is not None
    assert [array.tolist() for array in kept] == [[0, 1, 2, 3, 4], []]
    assert not kept[0].flags.writeable
    assert load_arrays(tmp_path / "x", {"of": "that"}) is None
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_numpy_reads_a_cache_and_its_arrays_are_aligned(tmp_path: Path) -> None:
    arrays = [np.arange(5, dtype=np.uint32), np.empty(0, dtype=np.uint8), np.arange(7, dtype=np.int64)]
    descriptors = len(os.listdir("/proc/self/fd"))
    kept = store_arrays(tmp_path / "x", {"of": "this"}, arrays)
    assert kept is not None
    assert all(array.ctypes.data % 64 == 0 for array in kept)
    assert len(os.listdir("/proc/self/fd")) == descriptors, "a set may have more shards than descriptors"
    with (tmp_path / "x").open("rb") as file:
        assert np.load(file).tobytes() == b'{"of": "this"}'
        for array in arrays:
            file.seek(-file.tell() % 64, os.SEEK_CUR)
            assert np.array_equal(np.load(file), array)


def test_a_record_before_a_destroyed_one_is_good_by_the_index(home: Path, tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "a.rec") as writer:
        for key in (2, 0, 3, 1):
            writer.write(key, pack_image(float(key), b"no JPEG" + bytes(17), id=key))
    stored = bytearray((tmp_path / "a.rec").read_bytes())
    stored[56 : 56 + 8] = bytes(8)  # the frame of key 0
    (tmp_path / "a.rec").write_bytes(stored)
    ds = RecordDataset.open(tmp_path)
    assert ds.labels(damaged=-1).tolist() == [-1, 1, 2, 3]
    assert ds.read(2)[0] == 2
    stored[4] = 24 + 16  # now the length of key 2, which lies before
    (tmp_path / "a.rec").write_bytes(stored)
    with pytest.raises(DamagedRecord, match="no record follows"):
        RecordDataset.open(tmp_path).read(2)


def write_ids(rec: Path, ids: list[int]) -> None:
    """Record k, under key k, is of label k mod 7 and carries another id."""
    with RecordWriter(rec) as writer:
        for key, number in enumerate(ids):
            writer.write(key, pack_image(float(key % 7), b"%d\xff\xd9" % key, id=number))


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([*range(600), *range(400)], id="two sets"),
        pytest.param([*range(900), *range(100)], id="a large and a small set"),
        pytest.param([*range(998), 0, 1], id="a large and a tiny set"),
        pytest.param([*range(400), *range(410, 600)], id="one identity left out"),
        pytest.param([*range(585), *range(590, 600)], id="left out near the end"),
        pytest.param([*range(0, 40, 2), *range(1, 40, 2)], id="two shards"),
    ],
)
def test_ids_that_are_keys_of_other_files_are_no_damage(ids: list[int], tmp_path: Path) -> None:
    """As older tools, which keep a record's id, join sets or leave some of one out."""
    write_ids(tmp_path / "a.rec", ids)
    for rebuilt in (False, True):
        if rebuilt:
            rebuild_index(tmp_path, force=True)
        ds = RecordDataset.open(tmp_path)
        images = {image.tobytes(): label for label, image in map(ds.read, range(len(ds)))}
        assert images == {b"%d\xff\xd9" % key: key % 7 for key in range(len(ids))}
        assert sorted(ds.labels().tolist()) == sorted(key % 7 for key in range(len(ids)))


@pytest.mark.parametrize("keys", [(98, 99), (3, 99), (97, 99), (0, 98), (40, 41)])
def test_swapped_lines_of_an_index_are_found_wherever_they_stand(keys: tuple[int, int], tmp_path: Path) -> None:
    write_ids(tmp_path / "a.rec", list(range(100)))
    lines = (tmp_path / "a.idx").read_text().splitlines()
    offsets = [line.split("\t")[1] for line in lines]
    for key, other in (keys, keys[::-1]):
        lines[key] = f"{key}\t{offsets[other]}"
    (tmp_path / "a.idx").write_text("\n".join(lines) + "\n")
    ds = RecordDataset.open(tmp_path)
    for key in range(100):
        if key in keys:
            with pytest.raises(DamagedRecord, match=f"key {key} .* says that it is key {sum(keys) - key}"):
                ds.read(key)
        else:
            assert ds.read(key)[0] == key % 7


@pytest.mark.parametrize("key", [0, 50, 98, 99])
def test_a_damaged_id_is_found_wherever_it_stands(key: int, tmp_path: Path) -> None:
    write_ids(tmp_path / "a.rec", [7 if i == key else i for i in range(100)])
    ds = RecordDataset.open(tmp_path)
    with pytest.raises(DamagedRecord, match=f"key {key} .* says that it is key 7"):
        ds.read(key)
    assert [ds.read(i)[0] for i in range(100) if i != key] == [i % 7 for i in range(100) if i != key]


# -- making an index from the .rec alone


def packed(out: Path, images: int = 30, shards: int = 2) -> Path:
    with ShardedWriter(out, identities=5, image_size=None, source="test", shards=shards) as writer:
        for i in range(images):
            writer.write(i % 5, b"%d\xff\xd9" % i)
    return out


def test_a_lost_index_is_made_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(tmp_path / "s")
    lost, kept = folder / "train-00000.idx", folder / "train-00001.idx"
    before = lost.read_bytes()
    lost.unlink()
    kept.write_text("mine\n")
    assert main(["inspect", str(folder)]) == 2
    assert "pfc inspect --rebuild-index" in capsys.readouterr().err
    assert main(["inspect", "--rebuild-index", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {lost}: 15 records, 0 damaged place(s) among them\n"
    assert lost.read_bytes() == before
    assert kept.read_text() == "mine\n"
    assert main(["inspect", "--rebuild-index", str(folder)]) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert main(["inspect", "--rebuild-index", "--force", str(folder / "train-00001.rec")]) == 0
    assert RecordDataset.open(folder).labels().tolist() == [i % 5 for s in range(2) for i in range(s, 30, 2)]
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_damaged_places_are_listed_under_the_keys_that_are_missing(tmp_path: Path) -> None:
    folder = packed(tmp_path / "s")
    rec = folder / "train-00001.rec"
    starts = [int(line.split()[1]) for line in (folder / "train-00001.idx").read_text().splitlines()]
    stored = bytearray(rec.read_bytes())
    stored[starts[3] : starts[5]] = bytes(starts[5] - starts[3])  # keys 7 and 9
    stored[starts[9] + 16] ^= 1  # the ids of keys 19, 21 (now 5, another's) and 25 (now far off)
    stored[starts[10] + 16] = 5
    stored[starts[12] + 21] = 1
    rec.write_bytes(stored)
    (made,) = rebuild_index(rec, force=True)
    assert (made.records, made.damaged) == (15, 1)
    ds = RecordDataset.open(rec)
    assert list(ds.shards[0].keys) == list(range(1, 30, 2))
    for i in range(15):
        if i in (3, 4, 9, 10, 12):
            with pytest.raises(DamagedRecord, match=f"key {1 + 2 * i} at byte {starts[3] if i < 5 else starts[i]}: "):
                ds.read(i)
        else:
            assert ds.read(i)[1].tobytes() == b"%d\xff\xd9" % (1 + 2 * i)


def test_without_ids_the_keys_count_from_0(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "a.rec") as writer:
        starts = [writer.write(key, pack_image(float(key % 2), b"%d\xff\xd9" % key)) for key in range(10, 20)]
    stored = (tmp_path / "a.rec").read_bytes()
    (tmp_path / "a.rec").write_bytes(
        stored[: starts[4]] + b"\1\2\3" + stored[starts[4] + 4 :]
    )  # off the multiples of 4
    rebuild_index(tmp_path, force=True)
    assert (tmp_path / "a.idx").read_text().splitlines()[5] == f"5\t{starts[5] - 1}"
    ds = RecordDataset.open(tmp_path)
    assert [ds.read(i)[1].tobytes() for i in range(10) if i != 4] == [
        b"%d\xff\xd9" % k for k in range(10, 20) if k != 14
    ]
    with pytest.raises(DamagedRecord, match="key 4"):
        ds.read(4)


def test_what_no_index_can_be_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"no \.rec file"):
        rebuild_index(tmp_path)
    (tmp_path / "a.rec").write_bytes(bytes(100))
    with pytest.raises(UsageError, match="not one whole record"):
        rebuild_index(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.rec"]
    assert main(["inspect", "--force", str(tmp_path)]) == 2
    assert main(["inspect", "--rebuild-index", "--json", str(tmp_path)]) == 2
    assert json.dumps(capsys.readouterr().err).count("\\n") == 2
