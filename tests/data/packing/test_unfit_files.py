"""Files that are missing, damaged, or do not belong together."""

import shutil
from pathlib import Path

import pytest

from pfc.data.errors import DamagedRecord, UsageError
from pfc.data.records.dataset import RecordDataset
from pfc.data.records.recordio import RecordWriter, pack_image
from tests.data.written import write_im2rec, write_insightface, write_packed


def refused(path: Path) -> str:
    """The one line that opening ``path`` is refused with."""
    with pytest.raises(UsageError) as caught:
        RecordDataset.open(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_places(tmp_path: Path) -> None:
    assert "no such data set" in refused(tmp_path / "none")
    assert "holds no .rec file" in refused(tmp_path)
    (tmp_path / "a.txt").touch()
    assert "neither a directory nor a .rec file" in refused(tmp_path / "a.txt")


def test_missing_files(tmp_path: Path) -> None:
    write_packed(tmp_path / "faces", [0, 1, 2])
    (tmp_path / "faces" / "train-00001.idx").unlink()
    assert "train-00001.idx: no such file" in refused(tmp_path / "faces")
    (tmp_path / "faces" / "train-00001.rec").unlink()
    assert "train-00001.rec: no such file" in refused(tmp_path / "faces")


def test_index_of_another_file(tmp_path: Path) -> None:
    write_im2rec(tmp_path / "a.rec", [0.0] * 40)
    write_im2rec(tmp_path / "b.rec", [0.0] * 70)
    shutil.copy(tmp_path / "b.idx", tmp_path / "a.idx")
    assert f"{tmp_path / 'a.idx'} does not belong to a.rec" in refused(tmp_path / "a.rec")

    with RecordWriter(tmp_path / "c.rec") as writer:
        for key in range(60):
            writer.write(key, bytes(40 + 4 * (key % 5)))
    shutil.copy(tmp_path / "b.idx", tmp_path / "c.idx")  # all offsets inside the file, but between the records
    assert "c.idx does not belong to c.rec" in refused(tmp_path / "c.rec")


def test_packed_set_with_swapped_or_shortened_files(tmp_path: Path) -> None:
    faces = write_packed(tmp_path / "faces", list(range(5)) * 8)
    lines = (faces / "train-00000.idx").read_text().splitlines(keepends=True)
    (faces / "train-00000.idx").write_text("".join(lines[:-1]))
    assert "train-00000.idx lists 13 records, 14 by its dataset.json" in refused(faces)
    (faces / "train-00000.idx").write_text("".join(lines))
    RecordDataset.open(faces)
    with (faces / "train-00002.rec").open("ab") as file:
        file.write(bytes(8))
    assert "train-00002.rec has" in refused(faces)
    with (faces / "train-00002.rec").open("r+b") as file:
        file.truncate(200)
    assert "train-00002" in refused(faces)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no record"),
        ("0\t0\n1\tx\n", "is no index"),
        ("0\t0\n1\n", "is no index"),
        ("0 0 1 32\n", "is no index"),
        ("0\n0\n1\n32\n", "is no index"),
        ("0\t0\n1\n32\t2\t64\n", "is no index"),
        ("0\t0\n0\t32\n", "key 0 is listed more than once"),
        ("0\t-4\n", "does not belong"),
        ("0\t99999999999999999999\n", "does not belong"),
        ("0\t2\n", "does not belong"),
    ],
)
def test_what_is_no_index(text: str, message: str, tmp_path: Path) -> None:
    write_im2rec(tmp_path / "a.rec", [0.0, 1.0])
    (tmp_path / "a.idx").write_text(text)
    assert message in refused(tmp_path)


def test_insightface_index_that_lost_lines(tmp_path: Path) -> None:
    write_insightface(tmp_path / "emore", [30, 10])
    idx = tmp_path / "emore" / "train.idx"
    lines = idx.read_text().splitlines(keepends=True)
    idx.write_text("".join(lines[:20] + lines[21:]))
    assert "39 of the 40 images" in refused(tmp_path / "emore")


def test_one_damaged_start_leaves_the_rest_readable(tmp_path: Path) -> None:
    write_im2rec(tmp_path / "a.rec", [float(i) for i in range(40)])
    stored = (tmp_path / "a.rec").read_bytes()
    (tmp_path / "a.rec").write_bytes(b"\0" + stored[1:])
    ds = RecordDataset.open(tmp_path)
    with pytest.raises(DamagedRecord, match="key 0 at byte 0: damaged: no record starts"):
        ds.read(0)
    assert [ds.label(i) for i in range(1, 40)] == list(range(1, 40))


@pytest.mark.parametrize("at", [0, 11, 36])  # the magic; a count; the other count
def test_damaged_header_record_loses_no_image(tmp_path: Path, at: int) -> None:
    labels = write_insightface(tmp_path / "emore", [30, 10])
    rec = tmp_path / "emore" / "train.rec"
    stored = bytearray(rec.read_bytes())
    stored[at : at + 4] = b"\xff\xff\xff\x7f"
    rec.write_bytes(stored)
    ds = RecordDataset.open(tmp_path / "emore")
    assert (ds.num_classes, ds.shards[0].identity_records) == (2, 2)
    assert ds.labels().tolist() == labels


def test_header_record_without_images(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.write(0, pack_image([float("nan"), 1.0], b""))
    assert "no image follows" in refused(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format": 1', '"format": 2', "format"),
        ('"images": 6', '"images": 7', "says 7 images, its shards together 6"),
        ('"identities": 5', '"identities": "many"', "identities"),
        ("{", "", "dataset.json"),
    ],
)
def test_invalid_manifest(old: str, new: str, message: str, tmp_path: Path) -> None:
    faces = write_packed(tmp_path / "faces", [0, 1, 2, 3, 4, 0])
    text = (faces / "dataset.json").read_text()
    assert old in text
    (faces / "dataset.json").write_text(text.replace(old, new, 1))
    line = refused(faces)
    assert message in line
    assert str(faces / "dataset.json") in line


@pytest.mark.parametrize("text", ["-3,40,40", "3,-40,40", "3,40", "3,40,forty"])
def test_what_is_no_property(text: str, tmp_path: Path) -> None:
    write_im2rec(tmp_path / "a.rec", [0.0] * 4)
    (tmp_path / "property").write_text(text)
    assert "should be one line 'num_classes,height,width'" in refused(tmp_path)


def test_damaged_names(tmp_path: Path) -> None:
    faces = write_packed(tmp_path / "faces", [0, 1, 2])
    (faces / "labels.json").write_text('["a"')
    with pytest.raises(UsageError, match=r"labels\.json is damaged: .*; bring the one that was written with"):
        RecordDataset.open(faces).identity_names()
