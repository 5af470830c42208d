"""Opening and reading data sets: pfc's own, im2rec's, InsightFace's."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from pfc.data.errors import DamagedRecord, UsageError
from pfc.data.packing.writer import ShardedWriter
from pfc.data.records.all_labels import ShardLabels
from pfc.data.records.dataset import RecordDataset
from pfc.data.records.labels import decode_label, encode_label, encoding_for
from pfc.data.records.recordio import RecordFile, RecordWriter, pack_image
from tests.data.written import image, write_im2rec, write_insightface, write_packed


def test_packed_set_reads_back(tmp_path: Path) -> None:
    labels = [i * 3 % 5 for i in range(20)]
    ds = RecordDataset.open(write_packed(tmp_path / "faces", labels))
    assert (len(ds), ds.num_classes, ds.image_size, ds.name) == (20, 5, (4, 6), "faces")
    found = [ds.read(i) for i in range(20)]
    order = [i for shard in range(3) for i in range(shard, 20, 3)]
    assert [label for label, _ in found] == [labels[i] for i in order]
    assert [data.tobytes() for _, data in found] == [image(i) for i in order]
    assert found[0][1].dtype == np.uint8
    assert ds.labels().tolist() == [ds.label(i) for i in range(20)]
    assert ds.labels().dtype == np.int32
    assert not ds.labels().flags.writeable
    with pytest.raises(IndexError):
        ds.read(20)
    with pytest.raises(IndexError):
        ds.read(-1)


def test_one_shard_of_a_packed_set(tmp_path: Path) -> None:
    write_packed(tmp_path / "faces", [i % 5 for i in range(20)])
    ds = RecordDataset.open(tmp_path / "faces" / "train-00001.rec")
    assert (len(ds), ds.num_classes, ds.image_size) == (7, 5, (4, 6))
    assert ds.labels().tolist() == [i % 5 for i in range(1, 20, 3)]


def test_insightface_set(tmp_path: Path) -> None:
    labels = write_insightface(tmp_path / "emore", [3, 1, 4])
    ds = RecordDataset.open(tmp_path / "emore")
    assert (len(ds), ds.num_classes, ds.image_size, ds.name) == (8, 3, None, "emore")
    assert ds.labels().tolist() == labels
    assert [ds.read(i)[1].tobytes() for i in range(8)] == [image(i) for i in range(8)]
    (shard,) = ds.shards
    assert (shard.header is not None, shard.identity_records) == (True, 3)


def test_property_file_comes_before_the_header_record(tmp_path: Path) -> None:
    write_insightface(tmp_path / "emore", [3, 1, 4])
    (tmp_path / "emore" / "property").write_text("10,112,96\n")
    ds = RecordDataset.open(tmp_path / "emore")
    assert (ds.num_classes, ds.image_size) == (10, (112, 96))
    (tmp_path / "emore" / "property").write_text("10x112\n")
    with pytest.raises(UsageError, match="num_classes,height,width"):
        RecordDataset.open(tmp_path / "emore")


def test_im2rec_sets(tmp_path: Path) -> None:
    write_im2rec(tmp_path / "b.rec", [4.0, 0.0, 2.0], keys=[30, 10, 20])
    write_im2rec(tmp_path / "a.rec", [1.0, 6.0])
    ds = RecordDataset.open(tmp_path)
    assert ds.labels().tolist() == [1, 6, 0, 2, 4]  # files by name, records by key
    assert [ds.read(i)[1].tobytes() for i in range(2, 5)] == [image(1), image(2), image(0)]
    assert (ds.num_classes, ds.told_classes) == (7, None)
    one = RecordDataset.open(tmp_path / "b.rec")
    assert (len(one), one.num_classes, one.name) == (3, 5, "b")


def test_an_image_with_several_labels_under_key_0_is_no_header(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.write(0, pack_image([3.0, 1.0], b"picture"))
        writer.write(1, pack_image([2.0, 1.0], b"picture"))
    assert RecordDataset.open(tmp_path).labels().tolist() == [3, 2]


def test_header_count_beyond_float32_finds_the_first_identity_record(tmp_path: Path) -> None:
    true_stop = 2**24 + 3  # the header can only say 2²⁴ + 4
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.write(0, pack_image([float(true_stop), float(true_stop + 4)], b""))
        for key in range(2**24 - 2, true_stop):
            writer.write(key, pack_image(0.0, b"x"))
        for key in range(true_stop, true_stop + 4):
            writer.write(key, pack_image([1.0, 2.0], b""))
    ds = RecordDataset.open(tmp_path)
    assert (len(ds), ds.shards[0].identity_records, ds.num_classes) == (5, 4, 4)


def test_labels_in_two_numbers_are_read_together_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [0, 1, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 5]
    with ShardedWriter(tmp_path / "big", identities=2**31 + 1, image_size=None, source="test", shards=2) as writer:
        for label in labels:
            writer.write(label, b"picture")
    ds = RecordDataset.open(tmp_path / "big")
    expected = [ds.label(i) for i in range(len(labels))]
    assert sorted(expected) == sorted(labels)
    rec = ds.shards[1].file.path
    stored = bytearray(rec.read_bytes())
    for place, value in ((0, 0.5), (1, float("nan")), (2, 2.0**24), (3, 300.0)):  # no labels of this data set
        at = int(ds.shards[1].offsets[place]) + 32
        stored[at : at + 4] = np.float32(value).tobytes()
    rec.unlink()
    rec.write_bytes(stored)
    odd: list[int] = []
    decode = ShardLabels.decode
    monkeypatch.setattr(
        ShardLabels, "decode", lambda self, record, *at: odd.append(record.id) or decode(self, record, *at)
    )
    assert RecordDataset.open(tmp_path / "big").labels(damaged=-1).tolist() == [*expected[:4], -1, -1, -1, -1]
    assert len(odd) == 4, "the others are read without a look at each"


def test_few_of_many_identity_records_are_read_to_find_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = RecordFile.read
    monkeypatch.setattr(RecordFile, "read", lambda file, at, **others: reads.append(at) or read(file, at, **others))
    for images, identities in ((1, 700), (300, 1), (300, 255), (300, 256), (300, 257), (2, 0)):
        stop = 2**24 + images  # float32 may round it
        rec = tmp_path / f"{identities}.rec"
        with RecordWriter(rec) as writer:
            writer.write(0, pack_image([float(stop), float(stop + identities)], b""))
            for key in range(stop - images, stop):
                writer.write(key, pack_image(0.0, b"x"))
            for key in range(stop, stop + identities):
                writer.write(key, pack_image([1.0, 2.0], b""))
        reads.clear()
        ds = RecordDataset.open(rec)
        assert (len(ds), ds.shards[0].identity_records) == (images, identities)
        assert len(reads) < 80


@pytest.mark.parametrize("label", [0, 1, 2**24 - 1, 2**24, 2**24 + 1, 2**25 + 1, 2**31 - 1, 2**31])
def test_labels_to_2_31(label: int, tmp_path: Path) -> None:
    with ShardedWriter(tmp_path / "big", identities=2**31 + 1, image_size=None, source="test") as writer:
        writer.write(label, b"picture")
        writer.write(2**31, b"picture")
    ds = RecordDataset.open(tmp_path / "big")
    assert json.loads((tmp_path / "big" / "dataset.json").read_text())["label_encoding"] == "float32x2"
    assert [ds.label(0), ds.label(1)] == ds.labels().tolist() == [label, 2**31]
    one = RecordDataset.open(tmp_path / "big" / "train.rec")  # the encoding counts for a single shard, too
    assert one.label(0) == label


def test_plain_labels_as_long_as_they_are_exact() -> None:
    assert encoding_for(2**24) == "float32"
    assert encoding_for(2**24 + 1) == "float32x2"
    last = encode_label(2**24 - 1, "float32")
    assert decode_label([float(np.float32(last))], "float32") == 2**24 - 1


@pytest.mark.parametrize("stored", [float("nan"), float("inf"), -1.0, 0.5])
def test_what_is_no_label_is_refused(stored: float, tmp_path: Path) -> None:
    write_im2rec(tmp_path / "a.rec", [1.0, stored, 2.0])
    ds = RecordDataset.open(tmp_path)
    assert ds.label(2) == 2
    with pytest.raises(DamagedRecord, match=r"a\.rec: key 1 at byte \d+: its label .* is not a whole number"):
        ds.read(1)
    with pytest.raises(DamagedRecord, match="key 1"):
        ds.labels()


@pytest.mark.parametrize("stored", [2.0**24, 2.0**24 + 2, 1e38])
def test_labels_that_float32_has_rounded_are_refused(stored: float, tmp_path: Path) -> None:
    write_im2rec(tmp_path / "a.rec", [2.0**24 - 1, stored])
    ds = RecordDataset.open(tmp_path)
    assert ds.label(0) == 2**24 - 1
    for read in (ds.labels, lambda: ds.read(1)):
        with pytest.raises(DamagedRecord, match=r"key 1 .* from where on float32 rounds labels"):
            read()


def test_label_outside_the_identities_is_refused(tmp_path: Path) -> None:
    write_im2rec(tmp_path / "a.rec", [1.0, 3.0])
    (tmp_path / "property").write_text("3,112,112")
    ds = RecordDataset.open(tmp_path)
    with pytest.raises(UsageError, match=r"a\.rec: key 1 at byte \d+: label 3 is not in 0 … 2"):
        ds.read(1)
    with pytest.raises(UsageError, match="label 3 is not in"):
        ds.labels()


def test_label_of_another_encoding_is_refused(tmp_path: Path) -> None:
    write_packed(tmp_path / "faces", [0, 1, 2], shards=1)
    manifest = tmp_path / "faces" / "dataset.json"
    manifest.write_text(manifest.read_text().replace('"float32"', '"float32x2"'))
    with pytest.raises(DamagedRecord, match="float32x2 has 2"):
        RecordDataset.open(tmp_path / "faces").read(0)
    with pytest.raises(DamagedRecord, match="float32x2 has 2"):
        RecordDataset.open(tmp_path / "faces").labels()


def test_damaged_record_is_named_and_the_others_read(tmp_path: Path) -> None:
    write_im2rec(tmp_path / "a.rec", [float(i) for i in range(100)])
    offset = int((tmp_path / "a.idx").read_text().splitlines()[50].split()[1])
    stored = bytearray((tmp_path / "a.rec").read_bytes())
    stored[offset + 4] ^= 0x10  # its length
    (tmp_path / "a.rec").write_bytes(stored)
    ds = RecordDataset.open(tmp_path)
    with pytest.raises(DamagedRecord, match="key 50") as caught:
        ds.read(50)
    assert (caught.value.key, caught.value.offset) == (50, offset)
    assert [ds.label(i) for i in range(100) if i != 50] == [i for i in range(100) if i != 50]


@pytest.mark.parametrize("keys", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_record_that_swallows_the_next_one_is_refused(keys: list[int], tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "a.rec") as writer:
        for key in keys:
            writer.write(key, pack_image(1.0, bytes(16)))  # 48 bytes in the file
    stored = bytearray((tmp_path / "a.rec").read_bytes())
    stored[48 + 4] += 48  # the second record would end where the third does
    (tmp_path / "a.rec").write_bytes(stored)
    ds = RecordDataset.open(tmp_path)
    with pytest.raises(DamagedRecord, match=f"key {keys[1]} at byte 48: damaged: runs into the next record"):
        ds.read(keys[1])
    assert [len(ds.read(key)[1]) for key in keys if key != keys[1]] == [16] * 3


def test_threads_read_alike(tmp_path: Path) -> None:
    ds = RecordDataset.open(write_packed(tmp_path / "faces", [i % 5 for i in range(50)]))
    expected = [ds.read(i)[1].tobytes() for i in range(50)]
    wrong: list[int] = []

    def read_all() -> None:
        wrong.extend(i for _ in range(20) for i in range(50) if ds.read(i)[1].tobytes() != expected[i])

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_names_of_the_room_load_on_first_use() -> None:
    import subprocess
    import sys

    code = (
        "import sys, pfc.data as d; d.RecordDataset, d.ShardedWriter; "
        "print([m for m in ('torch', 'PIL', 'nvidia', 'sklearn') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
