"""Inspection: counts what is there, names what is damaged."""

import io
import json
import struct
from pathlib import Path

import pytest
from PIL import Image

from pfc.data.checking.inspect import InspectReport, inspect_dataset
from pfc.data.errors import UsageError
from pfc.data.glyphs.synthetic import pack_synthetic
from pfc.data.records.dataset import RecordDataset
from pfc.data.records.recordio import RecordWriter, pack_image
from pfc.launch.cli import main


def jpeg(width: int = 8, height: int = 8) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(out, "JPEG")
    return out.getvalue()


def write(folder: Path, records: list[bytes]) -> Path:
    folder.mkdir()
    with RecordWriter(folder / "a.rec") as writer:
        for key, record in enumerate(records):
            writer.write(key, record)
    return folder


def change_rec(rec: Path, at: int, new: bytes) -> None:
    with rec.open("r+b") as file:
        file.seek(at)
        file.write(new)


def whats(report: InspectReport) -> dict[int, str]:
    return {error.key: error.what for error in report.errors if error.key is not None}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack_synthetic(tmp_path / "s", identities=4, images_per_identity=5, size=16, shards=2, workers=1)
    return tmp_path / "s"


def test_good_data_set(packed: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = inspect_dataset(packed, progress=lambda *a: calls.append(a))
    assert report.ok
    assert (report.images, report.identities, report.shards, report.skipped) == (20, 4, 2, 0)
    assert report.image_sizes == {"16x16": 20}
    assert report.images_per_identity == {"min": 5, "median": 5, "max": 5}
    assert (report.checksums, report.decoded, report.label_encoding) == ("ok", True, "float32")
    assert report.bytes == sum(rec.stat().st_size for rec in packed.glob("*.rec"))
    assert calls[-1] == (20, 20)
    assert str(report).endswith("all good")


def test_json_names_everything(packed: Path) -> None:
    change_rec(packed / "train-00000.rec", 0, b"\0")
    assert inspect_dataset(packed, checksums=False).errors[0].what == "damaged: no record starts at byte 0"
    change_rec(packed / "train-00000.rec", 0, b"\x0a")
    offset = int((packed / "train-00000.idx").read_text().splitlines()[1].split()[1])
    change_rec(packed / "train-00000.rec", offset + 5, b"\x77")
    found = json.loads(inspect_dataset(packed).to_json())
    assert {"images": 19, "identities": 4, "shards": 2, "skipped": 1, "ok": False}.items() <= found.items()
    by_checksum, by_record = found["errors"]
    assert (by_checksum["file"], by_checksum["key"]) == (str(packed / "train-00000.rec"), None)
    assert "sha256" in by_checksum["what"]
    assert (by_record["file"], by_record["key"], by_record["offset"]) == (by_checksum["file"], 2, offset)


def test_checksums_see_what_decoding_cannot(packed: Path) -> None:
    offset = int((packed / "train-00001.idx").read_text().splitlines()[3].split()[1])
    change_rec(packed / "train-00001.rec", offset + 24, b"\x99")  # in the record's id, which nobody needs
    report = inspect_dataset(packed)
    assert (report.checksums, report.images, report.damaged) == ("wrong", 20, 0)
    assert [(error.file, error.key) for error in report.errors] == [(str(packed / "train-00001.rec"), None)]
    skipped = inspect_dataset(packed, checksums=False)
    assert (skipped.checksums, skipped.ok) == ("skipped", True)


def test_header_and_identity_records_are_skipped_not_damage(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "f",
        [
            pack_image([4.0, 6.0], b""),
            *(pack_image(label, jpeg()) for label in (0.0, 0.0, 1.0)),
            pack_image([1.0, 3.0], b""),
            pack_image([3.0, 4.0], b""),
        ],
    )
    report = inspect_dataset(folder)
    assert report.ok
    assert (report.images, report.identities, report.skipped) == (3, 2, 3)
    assert (report.header_records, report.identity_records, report.damaged) == (1, 2, 0)
    assert report.checksums == "none"


def test_each_kind_of_damage_is_named(tmp_path: Path) -> None:
    cut = jpeg(64, 64)[:-20]
    folder = write(
        tmp_path / "f",
        [
            pack_image(0.0, jpeg()),
            pack_image(float("nan"), jpeg()),
            pack_image(9.0, jpeg()),
            pack_image(1.0, b""),
            pack_image(1.0, b"no picture"),
            pack_image(1.0, cut),
            b"short",
            pack_image(2.0, jpeg(8, 9)),
        ],
    )
    (folder / "property").write_text("5,8,8\n")
    report = inspect_dataset(folder)
    found = whats(report)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert "not a whole number" in found[1]
    assert "label 9 is not in 0 … 4" in found[2]
    assert "is empty" in found[3]
    assert "cannot be decoded: no image format starts like this" in found[4]
    assert "cannot be decoded: " in found[5]
    assert "too few" in found[6]
    assert (report.images, report.damaged, report.identities, report.identities_without_images) == (2, 6, 5, 3)
    assert report.image_sizes == {"8x8": 1, "9x8": 1}
    assert "key 4 at byte" in str(report)
    assert sorted(whats(inspect_dataset(folder, decode=False))) == [1, 2, 3, 4, 6]


def test_what_dali_refuses_is_damage_though_pillow_decodes_it(tmp_path: Path) -> None:
    gif, png = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    Image.new("RGB", (8, 8)).save(png, "PNG")
    records = [jpeg(), gif.getvalue(), png.getvalue()[:-4], png.getvalue()]
    folder = write(tmp_path / "f", [pack_image(0.0, image) for image in records])
    found = whats(inspect_dataset(folder))
    assert sorted(found) == [1, 2]
    assert "DALI does not decode GIF" in found[1]
    assert "the PNG is cut off" in found[2]


def test_image_of_another_size_than_promised(packed: Path) -> None:
    manifest = packed / "dataset.json"
    text = json.loads(manifest.read_text()) | {"image_size": [16, 17]}
    manifest.write_text(json.dumps(text))
    report = inspect_dataset(packed)
    assert report.damaged == 20
    assert "16x16, the data set's are (16, 17)" in report.errors[0].what


def test_errors_are_listed_up_to_a_limit_and_all_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", [pack_image(0.0, jpeg())] + [pack_image(0.0, b"x")] * 30)
    report = inspect_dataset(folder, max_errors=10)
    assert (len(report.errors), report.damaged, report.images) == (10, 30, 1)


def test_nothing_good_at_all(tmp_path: Path) -> None:
    report = inspect_dataset(write(tmp_path / "f", [pack_image(0.0, b"x")] * 3))
    assert (report.images, report.identities, report.damaged) == (0, 0, 3)
    assert report.images_per_identity == {"min": 0, "median": 0, "max": 0}
    assert not report.ok


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", [pack_image(i % 7, jpeg() if i % 100 else b"x") for i in range(10_300)])
    one, two = (inspect_dataset(folder, decode=False, workers=workers) for workers in (1, 2))
    assert one == two
    assert one.damaged == 103
    assert len(RecordDataset.open(folder)) == 10_300


def damage_some(folder: Path) -> tuple[Path, dict[int, tuple[int, bytes]]]:
    """A packed set of two shards with one damage of each kind; the good images by key."""
    pack_synthetic(folder, identities=4, images_per_identity=10, size=16, shards=2, workers=1)
    ds = RecordDataset.open(folder)
    good: dict[int, tuple[int, bytes]] = {}
    for i in range(40):
        shard, position = ds.locate(i)
        label, image = ds.read(i)
        good[int(shard.keys[position])] = (label, image.tobytes())
    offsets = {
        int(key): int(at)
        for shard in ds.shards
        for key, at in zip(shard.keys, shard.offsets, strict=True)
    }  # fmt: skip
    zero, one = folder / "train-00000.rec", folder / "train-00001.rec"
    change_rec(zero, offsets[4], b"\0")  # the magic
    change_rec(zero, offsets[10] + 5, b"\x77")  # the length
    change_rec(zero, offsets[16] + 12, struct.pack("<f", float("nan")))  # the label
    change_rec(zero, offsets[22] + 12, struct.pack("<f", -1.0))
    change_rec(zero, offsets[28] + 12, struct.pack("<f", 0.5))
    change_rec(zero, offsets[34] + 12, struct.pack("<f", 4.0))  # there are 4 identities
    change_rec(one, offsets[1] + 32, bytes(200))  # the image
    with one.open("r+b") as file:
        file.truncate(offsets[39] + 50)
    for key in (4, 10, 16, 22, 28, 34, 1, 39):
        del good[key]
    return folder, good


def test_repair_writes_a_clean_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, good = damage_some(tmp_path / "s")
    assert main(["inspect", str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["damaged"], found["skipped"], found["repaired"]) == (32, 8, 8, None)
    assert {error["key"] for error in found["errors"]} == {4, 10, 16, 22, 28, 34, 1, 39, None}
    assert main(["inspect", str(folder), "--repair", str(tmp_path / "out"), "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count(" at byte ") == 0  # the two files come first
    assert "and 9 more (see --limit)" in out
    assert out.endswith(f"damaged\nwrote the 32 good images to {tmp_path / 'out'}\n")

    report = inspect_dataset(tmp_path / "out")
    assert report.ok
    assert (report.images, report.shards, report.identities, report.checksums) == (32, 2, 4, "ok")
    clean, old = RecordDataset.open(tmp_path / "out"), RecordDataset.open(folder, strict=False)
    copied: dict[int, tuple[int, bytes]] = {}
    for i in range(32):
        shard, position = clean.locate(i)
        key = int(shard.keys[position])
        copied[key] = clean.label(i), clean.read(i)[1].tobytes()
        source = old.shards[key % 2]  # byte for byte, and in the same shard
        at = int(source.offsets[list(source.keys).index(key)])
        size = shard.length(position)
        start = int(shard.offsets[position])
        assert shard.file.bytes[start : start + size].tobytes() == source.file.bytes[at : at + size].tobytes()
    assert copied == good
    assert (tmp_path / "out" / "property").read_bytes() == (folder / "property").read_bytes()


def test_damage_that_is_not_listed_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "f", [pack_image(0.0, jpeg()), pack_image(0.0, b"x")])
    assert main(["inspect", str(folder), "--json", "--limit", "0"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["errors"], found["errors_found"], found["ok"]) == ([], 1, False)


def test_repair_of_other_tools_sets(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "f",
        [
            pack_image([4.0, 6.0], b""),
            *(pack_image(label, jpeg()) for label in (0.0, 0.0)),
            pack_image(1.0, b"no picture"),
            pack_image([1.0, 3.0], b""),
            pack_image([3.0, 4.0], b""),
        ],
    )
    (folder / "property").write_text("2,8,8\n")
    report = inspect_dataset(folder, repair=tmp_path / "out")
    assert report.repaired == str(tmp_path / "out")
    ds = RecordDataset.open(tmp_path / "out")
    assert (len(ds), ds.num_classes, ds.image_size, list(ds.shards[0].keys)) == (2, 2, (8, 8), [1, 2])
    assert inspect_dataset(tmp_path / "out").ok


def test_repair_touches_nothing_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = damage_some(tmp_path / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        inspect_dataset(folder, repair=tmp_path / "full")
    with pytest.raises(UsageError, match="is not empty"):
        inspect_dataset(folder, repair=folder)
    (tmp_path / "empty").mkdir()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pfc.data.checking.repair._write_about", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inspect_dataset(folder, repair=tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "s"]
    assert not list((tmp_path / "empty").iterdir())
    monkeypatch.undo()
    inspect_dataset(folder, repair=tmp_path / "empty")
    assert len(RecordDataset.open(tmp_path / "empty")) == 32


def test_nothing_good_to_repair(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", [pack_image(0.0, b"x")] * 3)
    with pytest.raises(UsageError, match="not one image is good"):
        inspect_dataset(folder, repair=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_records_that_the_index_leaves_out_are_missed(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", [pack_image(0.0, jpeg())] * 3)
    (folder / "a.idx").write_text("".join((folder / "a.idx").read_text().splitlines(keepends=True)[:2]))
    (error,) = inspect_dataset(folder).errors
    assert "leaves out" in error.what
    assert "--rebuild-index --force" in error.what


def test_a_file_of_which_most_is_lost_is_still_read(packed: Path) -> None:
    rec = packed / "train-00000.rec"
    at = int((packed / "train-00000.idx").read_text().splitlines()[1].split()[1])
    with rec.open("r+b") as file:
        file.truncate(at)
    with pytest.raises(UsageError, match="cut short"):
        RecordDataset.open(packed)
    report = inspect_dataset(packed)
    assert (report.images, report.damaged) == (11, 9)
    assert f"has {at} bytes" in report.errors[0].what


def test_a_file_of_which_much_is_damaged_is_still_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", [pack_image(0.0, jpeg())] * 20)
    starts = [int(line.split()[1]) for line in (folder / "a.idx").read_text().splitlines()]
    for start in starts[:10]:
        change_rec(folder / "a.rec", start, b"\0")
    with pytest.raises(UsageError, match="does not belong"):
        RecordDataset.open(folder)
    report = inspect_dataset(folder)
    assert (report.images, report.damaged) == (10, 10)
