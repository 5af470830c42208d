"""Packing RecordIO anew: shards, order, filters, merges; both conventions; labels of any size."""

import io
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfc.data import RecordDataset, ShardedWriter, inspect_dataset, pack_recordio
from pfc.data.checking.rebuild import rebuild_index
from pfc.data.errors import UsageError
from pfc.data.records.recordio import MAGIC_BYTES, RecordFile, RecordWriter, pack_image
from pfc.launch.cli import main
from tests.data.packing.packed import contents, files_of, jpeg, refusal


def write_set(out: Path, labels: list[int], *, names: list[str] | None = None, first: int = 0, shards: int = 1) -> Path:
    identities = max(labels) + 1 if names is None else names
    with ShardedWriter(out, identities=identities, image_size=(8, 8), source="test", shards=shards) as writer:
        for i, label in enumerate(labels):
            writer.write(label, jpeg(first + i))
    return out


def write_plain(rec: Path, records: list[tuple[float | list[float], bytes]], *, first_key: int = 0) -> None:
    """Records by im2rec's convention, with both ids set."""
    rec.parent.mkdir(exist_ok=True)
    with RecordWriter(rec) as writer:
        for i, (label, image) in enumerate(records):
            payload = bytearray(pack_image(label, image, id=1000 + i))
            struct.pack_into("<Q", payload, 16, 7)
            writer.write(first_key + i, bytes(payload))


def write_insightface(folder: Path, per_identity: list[int]) -> None:
    folder.mkdir()
    labels = [label for label, count in enumerate(per_identity) for _ in range(count)]
    with RecordWriter(folder / "train.rec") as writer:
        stop = 1 + len(labels)
        writer.write(0, pack_image([float(stop), float(stop + len(per_identity))], b""))
        for i, label in enumerate(labels):
            writer.write(1 + i, pack_image([float(label), 0.5] if i % 2 else float(label), jpeg(i)))
        first = 1
        for i, count in enumerate(per_identity):
            writer.write(stop + i, pack_image([float(first), float(first + count)], b""))
            first += count
    (folder / "property").write_text(f"{len(per_identity)},8,8\n")


def payloads(path: Path) -> list[bytes]:
    ds = RecordDataset.open(path)
    places = [ds.locate(i) for i in range(len(ds))]
    return [shard.file.read(int(shard.offsets[position])).tobytes() for shard, position in places]


@pytest.mark.parametrize("seed", range(4))
def test_random_sets_read_back(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    identities = int(random.integers(1, 9))
    labels = random.integers(0, identities, int(random.integers(identities, 50))).tolist()
    names = [f"p{label}" for label in range(identities)] if seed % 2 else None
    source = write_set(tmp_path / "in", labels, names=names, shards=1 + seed % 3)
    summary = pack_recordio(
        source, tmp_path / "out", shards=2 if len(labels) > 1 else 1, seed=seed, workers=1 + seed % 2
    )
    given = contents(source)
    assert contents(tmp_path / "out") == given
    assert (summary.images, summary.identities) == (len(labels), len({name for name, _ in given}))
    assert inspect_dataset(tmp_path / "out", workers=1).ok


def test_records_whose_labels_stay_are_the_same_but_for_their_ids(tmp_path: Path) -> None:
    records: list[tuple[float | list[float], bytes]] = [
        (0.0, b"one"),
        ([1.0, 0.25, 9.0], jpeg(1) + MAGIC_BYTES * 3),
        ([2.0], jpeg(2)),
        (0.0, MAGIC_BYTES + b"x"),
    ]
    write_plain(tmp_path / "in" / "a.rec", records)
    given = payloads(tmp_path / "in")
    pack_recordio(tmp_path / "in", tmp_path / "same", workers=1, shuffle=False)
    assert payloads(tmp_path / "same") == [
        payload[:8] + struct.pack("<Q", key) + payload[16:] for key, payload in enumerate(given)
    ]
    pack_recordio(tmp_path / "in", tmp_path / "mixed", workers=1, shards=2, seed=5)
    without_ids = [Counter(p[:8] + p[16:] for p in found) for found in (payloads(tmp_path / "mixed"), given)]
    assert without_ids[0] == without_ids[1]


def test_a_new_label_leaves_all_else_of_a_record(tmp_path: Path) -> None:
    write_plain(tmp_path / "in" / "a.rec", [(5.0, b"one"), ([9.0, 0.25], b"two")])
    pack_recordio(tmp_path / "in", tmp_path / "out", workers=1, shuffle=False)
    assert payloads(tmp_path / "out") == [
        struct.pack("<IfQQ", 0, 0.0, 0, 7) + b"one",
        struct.pack("<IfQQ2f", 2, 0.0, 1, 7, 1.0, 0.25) + b"two",
    ]
    assert RecordDataset.open(tmp_path / "out").identity_names() == ["5", "9"]


@pytest.mark.parametrize("shards", [1, 3])
def test_sets_joined_in_their_own_order_are_whole(shards: int, tmp_path: Path) -> None:
    a = write_set(tmp_path / "a", [i // 10 for i in range(600)])
    b = write_set(tmp_path / "b", [i // 10 for i in range(400)], first=600)
    assert main(["pack", "recordio", str(a), str(b), str(tmp_path / "c"), "--no-shuffle", "--shards", str(shards)]) == 0
    check_whole(tmp_path / "c", [(i // 10, jpeg(i)) for i in range(1000)])


def test_a_set_without_one_identity_is_whole(tmp_path: Path) -> None:
    source = write_set(tmp_path / "a", [i // 10 for i in range(600)])
    (tmp_path / "out.txt").write_text("40\n")
    without = ["--without", str(tmp_path / "out.txt"), "--no-shuffle"]
    assert main(["pack", "recordio", str(source), str(tmp_path / "c"), *without]) == 0
    kept = [i for i in range(600) if i // 10 != 40]
    check_whole(tmp_path / "c", [(place // 10, jpeg(i)) for place, i in enumerate(kept)])
    (tmp_path / "out.txt").write_text("41\n")
    pack_recordio(tmp_path / "c", tmp_path / "d", without=tmp_path / "out.txt", shuffle=False, workers=1)
    pack_recordio(tmp_path / "d", tmp_path / "e", shuffle=False, keep_labels=True, workers=1)
    again = [i for i in kept if i // 10 != 41]
    check_whole(tmp_path / "d", [(place // 10, jpeg(i)) for place, i in enumerate(again)])
    check_whole(tmp_path / "e", [(place // 10, jpeg(i)) for place, i in enumerate(again)])


def check_whole(path: Path, by_key: list[tuple[int, bytes]]) -> None:
    """The data set holds (label, image) under key 0, 1, ..., and so does one whose indices were made anew."""
    for rebuilt in (False, True):
        if rebuilt:
            rebuild_index(path, force=True)
        report = inspect_dataset(path, workers=1)
        assert (report.ok, report.images, report.errors) == (True, len(by_key), [])
        ds = RecordDataset.open(path)
        places = [(int(shard.keys[at]), ds.read(i)) for i in range(len(ds)) for shard, at in [ds.locate(i)]]
        found = {key: (label, image.tobytes()) for key, (label, image) in places}
        assert found == dict(enumerate(by_key))
        assert ds.labels().tolist() == [label for _, (label, _) in places]


def test_both_conventions_and_the_order_of_the_source(tmp_path: Path) -> None:
    write_insightface(tmp_path / "emore", [3, 1, 2])
    pack_recordio(tmp_path / "emore", tmp_path / "out", workers=1, shuffle=False, images_per_shard=4)
    ds = RecordDataset.open(tmp_path / "out")
    assert (len(ds), ds.num_classes, len(ds.shards), ds.image_size) == (6, 3, 2, (8, 8))
    by_key = sorted((int(shard.keys[at]), ds.read(i)) for i in range(6) for shard, at in [ds.locate(i)])
    assert [(label, image.tobytes()) for _, (label, image) in by_key] == [
        (label, jpeg(i)) for i, label in enumerate([0, 0, 0, 1, 2, 2])
    ]


def test_identities_can_be_filtered(tmp_path: Path) -> None:
    labels = [0] * 4 + [1] * 2 + [2] * 5 + [3]
    source = write_set(tmp_path / "in", labels, names=["anna", "bob", "carl", "dora"])
    summary = pack_recordio(source, tmp_path / "many", min_images=3, workers=1)
    assert (summary.identities, summary.dropped_identities, summary.dropped_images) == (2, 2, 3)
    assert "left out 2 identities with 3 images" in str(summary)
    given = contents(source)
    assert contents(tmp_path / "many") == {item: n for item, n in given.items() if item[0] in ("anna", "carl")}
    assert RecordDataset.open(tmp_path / "many").identity_names() == ["anna", "carl"]

    (tmp_path / "names").write_text("bob\ncarl\r\n\n")
    pack_recordio(source, tmp_path / "only", only=tmp_path / "names", workers=1)
    assert RecordDataset.open(tmp_path / "only").identity_names() == ["bob", "carl"]
    pack_recordio(source, tmp_path / "without", without=tmp_path / "names", keep_labels=True, workers=1)
    ds = RecordDataset.open(tmp_path / "without")
    assert (ds.num_classes, sorted(set(ds.labels().tolist()))) == (4, [0, 3])
    assert ds.identity_names() == ["anna", "", "", "dora"]

    (tmp_path / "slip").write_text("bob\nbop\n")
    assert "names 1 identities that the source does not have: bop" in refusal(
        pack_recordio, source, tmp_path / "x", only=tmp_path / "slip"
    )
    assert "no such file" in refusal(pack_recordio, source, tmp_path / "x", only=tmp_path / "none")
    assert "nothing to pack" in refusal(pack_recordio, source, tmp_path / "x", min_images=6)


def test_sets_are_merged_with_identities_apart(tmp_path: Path) -> None:
    a = write_set(tmp_path / "one" / "faces", [0, 1, 1], names=["anna", "bob"])
    b = write_set(tmp_path / "two" / "faces", [2, 0], first=10)
    write_insightface(tmp_path / "emore", [2, 1])
    summary = pack_recordio([a, b, tmp_path / "emore"], tmp_path / "out", shards=3, workers=1)
    assert (summary.images, summary.identities) == (8, 6)
    names = ["faces-1/anna", "faces-1/bob", "faces-2/0", "faces-2/2", "emore/0", "emore/1"]
    assert RecordDataset.open(tmp_path / "out").identity_names() == names
    images = {**{("faces-1/anna", jpeg(0)): 1, ("faces-1/bob", jpeg(1)): 1, ("faces-1/bob", jpeg(2)): 1}}
    images |= {("faces-2/2", jpeg(10)): 1, ("faces-2/0", jpeg(11)): 1}
    images |= {("emore/0", jpeg(0)): 1, ("emore/0", jpeg(1)): 1, ("emore/1", jpeg(2)): 1}
    assert contents(tmp_path / "out") == images


def test_sets_are_merged_by_name_and_by_number(tmp_path: Path) -> None:
    a = write_set(tmp_path / "a", [0, 1, 1], names=["anna", "bob"])
    b = write_set(tmp_path / "b", [0, 1], names=["bob", "carl"], first=10)
    pack_recordio([a, b], tmp_path / "named", joining="shared", workers=1)
    assert contents(tmp_path / "named") == contents(a) + contents(b)
    assert RecordDataset.open(tmp_path / "named").identity_names() == ["anna", "bob", "carl"]
    write_plain(tmp_path / "c" / "c.rec", [(11.0, b"x"), (2.0, b"y")])
    write_plain(tmp_path / "d" / "d.rec", [(100.0, b"z"), (2.0, b"w")])
    pack_recordio(
        [tmp_path / "c", tmp_path / "d"], tmp_path / "numbered", joining="shared", keep_labels=True, workers=1
    )
    ds = RecordDataset.open(tmp_path / "numbered")
    assert (ds.num_classes, sorted(ds.labels().tolist())) == (101, [2, 2, 11, 100])


def test_names_and_numbers_share_nothing(tmp_path: Path) -> None:
    a = write_set(tmp_path / "a", [0, 1, 1], names=["anna", "bob"])
    b = write_set(tmp_path / "b", [0, 1], names=["bob", "carl"], first=10)
    (b / "labels.json").unlink()
    with pytest.raises(UsageError, match=r"/a has names .*/b numbers alone.*bring the labels\.json of .*/b, or leave"):
        pack_recordio([a, b], tmp_path / "out", joining="shared", workers=1)
    assert not (tmp_path / "out").exists()


def test_damaged_records_are_left_out_and_named(tmp_path: Path) -> None:
    records: list[tuple[float | list[float], bytes]] = [(float(i % 2), jpeg(i)) for i in range(6)]
    records[2] = (float("nan"), jpeg(2))
    records[3] = (1.0, b"")
    records[4] = (0.0, b"no picture")
    write_plain(tmp_path / "in" / "a.rec", records)
    rec = tmp_path / "in" / "a.rec"
    damaged = bytearray(rec.read_bytes())
    damaged[0] ^= 255  # the first record's magic
    rec.write_bytes(damaged)
    summary = pack_recordio(tmp_path / "in", tmp_path / "out", workers=1)
    assert [name for name, _ in summary.skipped] == [f"{rec} key {key}" for key in (0, 2, 3)]
    assert "not a whole number" in summary.skipped[1][1]
    assert contents(tmp_path / "out") == {("1", jpeg(1)): 1, ("1", jpeg(5)): 1, ("0", b"no picture"): 1}
    summary = pack_recordio(tmp_path / "in", tmp_path / "checked", check=True, workers=1)
    assert [name for name, _ in summary.skipped] == [f"{rec} key {key}" for key in (0, 2, 3, 4)]
    assert summary.empty_identities == ["0"]
    assert "key 0" in refusal(pack_recordio, tmp_path / "in", tmp_path / "strict", strict=True)


@pytest.mark.parametrize("ascending", [True, False])
def test_the_record_before_a_damaged_one_is_kept(ascending: bool, tmp_path: Path) -> None:
    """The index says that it ended where it should."""
    rec = tmp_path / "in" / "a.rec"
    write_plain(rec, [(float(i), b"no picture %d" % i) for i in range(5)])
    offsets = [int(line.split("\t")[1]) for line in rec.with_suffix(".idx").read_text().splitlines()]
    if not ascending:
        rec.with_suffix(".idx").write_text("".join(f"{i}\t{offset}\n" for i, offset in enumerate(offsets[::-1])))
    damaged = bytearray(rec.read_bytes())
    damaged[offsets[2]] ^= 255
    rec.write_bytes(damaged)
    summary = pack_recordio(rec, tmp_path / "out", workers=1)
    assert [name for name, _ in summary.skipped] == [f"{rec} key 2"]
    assert contents(tmp_path / "out") == {(str(i), b"no picture %d" % i): 1 for i in (0, 1, 3, 4)}


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_system_is_told_of_random_reads(shuffle: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "in", [0, 1, 2])
    told: list[tuple[Path, bool]] = []
    monkeypatch.setattr(RecordFile, "expect_random_reads", lambda file, yes=True: told.append((file.path, yes)))
    pack_recordio(tmp_path / "in", tmp_path / "out", shuffle=shuffle, workers=1)
    assert told[-1] == (tmp_path / "in" / "train.rec", shuffle)


def test_files_that_macos_leaves_are_no_shards(tmp_path: Path) -> None:
    write_plain(tmp_path / "in" / "a.rec", [(0.0, jpeg(0)), (1.0, jpeg(1))])
    (tmp_path / "in" / "._a.rec").write_bytes(b"\0\5\x16\7")
    pack_recordio(tmp_path / "in", tmp_path / "out", workers=1)
    assert len(RecordDataset.open(tmp_path / "out")) == 2
    (tmp_path / "in" / "a.idx").unlink()
    assert [made.idx.name for made in rebuild_index(tmp_path / "in")] == ["a.idx"]


def test_images_are_converted_where_it_is_asked(tmp_path: Path) -> None:
    ready, large = jpeg(0), jpeg(1, width=20, height=16)
    write_plain(tmp_path / "in" / "a.rec", [(0.0, ready), (0.0, large)])
    pack_recordio(tmp_path / "in", tmp_path / "out", size=8, shuffle=False, workers=1)
    ds = RecordDataset.open(tmp_path / "out")
    images = [ds.read(i)[1].tobytes() for i in range(2)]
    assert images[0] == ready
    assert Image.open(io.BytesIO(images[1])).size == (8, 8)
    assert ds.image_size == (8, 8)
    pack_recordio(tmp_path / "in", tmp_path / "png", encoding="png", workers=1)
    ds = RecordDataset.open(tmp_path / "png")
    sizes = {Image.open(io.BytesIO(ds.read(i)[1].tobytes())).size for i in range(2)}
    assert (sizes, ds.image_size) == ({(8, 8), (20, 16)}, None)


def test_labels_up_to_2_to_the_31(tmp_path: Path) -> None:
    labels = [0, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1]
    with ShardedWriter(tmp_path / "in", identities=2**31, image_size=None, source="test") as writer:
        for label in labels:
            writer.write(label, b"%d" % label)
    given = contents(tmp_path / "in")
    assert given == {(str(label), b"%d" % label): 1 for label in labels}
    pack_recordio(tmp_path / "in", tmp_path / "same", keep_labels=True, shuffle=False, workers=1)
    ds = RecordDataset.open(tmp_path / "same")
    assert (ds.num_classes, ds.label_encoding, ds.labels().tolist()) == (2**31, "float32x2", labels)
    assert payloads(tmp_path / "same") == payloads(tmp_path / "in")  # no key has changed
    # Compacted, they fit into one number again; and back.
    pack_recordio(tmp_path / "in", tmp_path / "small", workers=1)
    assert RecordDataset.open(tmp_path / "small").label_encoding == "float32"
    assert contents(tmp_path / "small") == given
    pack_recordio(
        [tmp_path / "small", tmp_path / "in"], tmp_path / "both", joining="shared", keep_labels=True, workers=1
    )
    assert contents(tmp_path / "both") == given + given
    ids = [struct.unpack_from("<Q", payload, 8)[0] for payload in payloads(tmp_path / "both")]
    assert ids == list(range(10))


def test_wrong_sources(tmp_path: Path) -> None:
    source = write_set(tmp_path / "in", [0, 1])
    before = files_of(tmp_path)
    out = tmp_path / "out"
    assert "given twice" in refusal(pack_recordio, [source, source / "train.rec"], out)
    assert "no such data set" in refusal(pack_recordio, tmp_path / "none", out)
    assert "lie one in the other" in refusal(pack_recordio, source, source / "out")
    assert "lie one in the other" in refusal(pack_recordio, source, source, overwrite=True)
    assert "name at least one" in refusal(pack_recordio, [], out)
    assert "choose one of both" in refusal(pack_recordio, source, out, size=8, keep_bytes=True)
    assert "exclude each other" in refusal(pack_recordio, source, out, shards=2, images_per_shard=1)
    other = write_set(tmp_path / "other", [0])
    assert "labels cannot be kept" in refusal(pack_recordio, [source, other], out, keep_labels=True)
    assert {name: data for name, data in files_of(tmp_path).items() if not name.startswith("other")} == before
