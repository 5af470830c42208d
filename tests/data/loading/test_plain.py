"""The compiled way to plain records gives what RecordDataset.read gives, or nothing."""

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfc.data.errors import DamagedRecord
from pfc.data.loading import plain as plain_module
from pfc.data.loading.loader import TrainLoader
from pfc.data.loading.plain import PlainRecords
from pfc.data.records.dataset import RecordDataset
from pfc.data.records.joint import JointDataset
from pfc.data.records.recordio import RecordWriter, pack_image
from tests.data.pictures import SIZE, encode, pack, picture


@pytest.fixture(scope="module", params=["PNG", "JPEG"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "set"
    pack(path, [encode(picture(i, (8, 8)), request.param) for i in range(60)], identities=7, shards=3)
    return path


def test_a_packed_set_is_plain(folder: Path) -> None:
    dataset = RecordDataset.open(folder)
    found = PlainRecords(dataset).find(np.arange(60)[::-1])
    for place, index in enumerate(range(60)[::-1]):
        label, image = dataset.read(index)
        assert (found.labels[place], found[place].tobytes()) == (label, image.tobytes())


def test_joint_sets_have_joint_labels(folder: Path) -> None:
    joint = JointDataset([RecordDataset.open(folder)] * 2)
    found = PlainRecords(joint).find(np.arange(120))
    assert found.labels.tolist() == joint.labels().tolist()
    assert found[70].tobytes() == joint.read(70)[1].tobytes()


@pytest.mark.parametrize("keys", [range(5), [2, 3, 7, 11, 12]])
def test_other_records_are_left_to_the_data_set(keys: Sequence[int], tmp_path: Path) -> None:
    image = encode(picture(0, (8, 8)))
    with RecordWriter(tmp_path / "a.rec") as writer:
        for key, record in zip(
            keys,
            [
                pack_image([3.0, 9.0], image, id=keys[0]),  # two labels
                pack_image(1.0, image + (0xCED7230A).to_bytes(4, "little") * 3, id=keys[1]),  # in parts
                pack_image(2.5, image, id=keys[2]),  # no label
                pack_image(2.0, image, id=keys[3]),
                pack_image(2.0, b"no image", id=keys[4]),
            ],
            strict=True,
        ):
            writer.write(key, record)
    (tmp_path / "property").write_text("5,8,8")
    plain = PlainRecords(RecordDataset.open(tmp_path))
    assert plain.find(np.arange(5)).labels.tolist() == [-1, -1, -1, 2, -1]


def test_a_record_with_another_one_inside_is_not_plain(tmp_path: Path) -> None:
    magic = struct.pack("<I", 0xCED7230A)
    with (tmp_path / "a.rec").open("wb") as rec, (tmp_path / "a.idx").open("w") as idx:
        for key in range(12):
            image = jpeg(comment=b"x" * key + magic) if key < 8 else jpeg()
            payload = pack_image(0.0, image, id=key)
            idx.write(f"{key}\t{rec.tell()}\n")
            rec.write(magic + struct.pack("<I", len(payload)) + payload + bytes(-len(payload) % 4))
    dataset = RecordDataset.open(tmp_path / "a.rec", strict=False)
    inside = []
    for index in range(12):
        try:
            dataset.read(index)
        except DamagedRecord:
            inside.append(index)
    labels = PlainRecords(dataset).find(np.arange(12)).labels
    assert np.flatnonzero(labels < 0).tolist() == inside
    assert len(inside) == 2, "every fourth place is one where a record can start"


@pytest.mark.parametrize("offsets", [(10**12, -(2**63)), (-(2**63), 10**12), (2**63 - 1, -(2**63)), (-1, 1), (0, 31)])
def test_offsets_that_lead_nowhere_are_not_followed(offsets: tuple[int, int], folder: Path, tmp_path: Path) -> None:
    rec = RecordDataset.open(folder).shards[0].file.path
    (tmp_path / rec.name).write_bytes(rec.read_bytes())
    lines = rec.with_suffix(".idx").read_text().splitlines()
    lines[10:12] = [f"{lines[10 + i].split()[0]}\t{offset}" for i, offset in enumerate(offsets)]
    (tmp_path / rec.name).with_suffix(".idx").write_text("\n".join(lines) + "\n")
    found = PlainRecords(RecordDataset.open(tmp_path / rec.name, strict=False)).find(np.arange(20))
    assert found.labels[10:12].tolist() == [-1, -1]
    assert (found.labels[:9] >= 0).all()
    assert (found.labels[12:] >= 0).all()


def test_no_sample_outside_the_set_is_found(folder: Path) -> None:
    plain = PlainRecords(RecordDataset.open(folder))
    assert plain.find(np.array([-1, 60, 1 << 40, -(1 << 40)])).labels.tolist() == [-1] * 4


@pytest.mark.parametrize("cut", [1, 3, 9, 200])
def test_records_that_run_past_the_end_of_the_file_are_not_plain(cut: int, folder: Path, tmp_path: Path) -> None:
    whole = RecordDataset.open(folder).shards[0]
    rec, end = whole.file.path, int(whole.offsets[11])
    (tmp_path / rec.name).write_bytes(rec.read_bytes()[: end - cut])
    (tmp_path / rec.name).with_suffix(".idx").write_bytes(rec.with_suffix(".idx").read_bytes())
    found = PlainRecords(RecordDataset.open(tmp_path / rec.name, strict=False)).find(np.arange(20))
    assert found.labels[:10].min() == 0
    assert found.labels[10:].tolist() == [-1] * 10


def test_rows_hold_the_images_and_zeros(folder: Path) -> None:
    found = PlainRecords(RecordDataset.open(folder)).find(np.arange(60))
    np.full((60, max(map(len, found))), 255, dtype=np.uint8)  # leaves memory behind that is not zero
    rows = found.rows()
    assert rows is not None
    assert rows.shape == (60, max(map(len, found)))
    for row, image in zip(rows, found, strict=True):
        assert row[: len(image)].tobytes() == image.tobytes()
        assert not row[len(image) :].any()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_images_that_do_not_say_where_they_end_or_differ_much_have_no_rows(form: str, tmp_path: Path) -> None:
    whole, large = encode(picture(0, (8, 8)), form), encode(picture(1, (256, 256)), form)
    cases = {"whole": [whole] * 4, "large": [whole] * 4 + [large]}
    for name, images in (cases | ({"cut": [whole, whole[:-3]]} if form == "JPEG" else {})).items():
        pack(tmp_path / name, images, identities=2)
        found = PlainRecords(RecordDataset.open(tmp_path / name)).find(np.arange(len(images)))
        assert found.labels.min() == 0, name
        assert (found.rows() is not None) == (name == "whole"), name


def jpeg(**options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(0, (64, 64))).save(file, "JPEG", **options)
    return file.getvalue()


def test_a_jpeg_has_rows_where_every_marker_leads_to_the_next_and_the_last_ends_it(tmp_path: Path) -> None:
    plain = jpeg()
    scan = plain.index(b"\xff\xda")
    middle = (scan + len(plain)) // 2
    tables = b"\xff\xdb\0\3\0" + b"\xff\xfe\0\4hi"  # between scans
    cases = {
        "plain": (plain, True),
        "progressive": (jpeg(progressive=True), True),
        "restarts": (jpeg(restart_marker_blocks=1), True),
        "segments behind the scan": (plain[:-2] + tables + plain[-2:], True),
        "something behind the end": (plain + b"\0", False),
        "no end": (plain[:-2], False),
        "half an end": (plain[:-1], False),
        "another end": (plain[:-1] + b"\xda", False),
        "an end in the middle": (plain[:middle] + b"\xff\xd9" + plain[middle:], False),
        "a segment longer than the image": (plain[:middle] + b"\xff\xc4\xff\xff" + plain[middle:], False),
        "a segment up to the end": (plain[:-20] + b"\xff\xc4\0\x12" + plain[-18:], True),
        "a segment into the end": (plain[:-20] + b"\xff\xc4\0\x13" + plain[-18:], False),
        "a segment over the end": (plain[:-20] + b"\xff\xc4\0\x14" + plain[-18:], False),
        "a segment without content": (plain[:middle] + b"\xff\xc4\0\2\xff\xda" + plain[middle:], False),
        "coded bytes behind a segment": (plain[:-2] + tables + b"coded" + plain[-2:], False),
        "an unknown marker": (plain[:middle] + b"\xff\1" + plain[middle:], False),
        "another frame": (plain[:-2] + b"\xff\xc0\0\3\0" + plain[-2:], False),
        "components that do not fit": (plain[: scan + 4] + b"\2" + plain[scan + 5 :], False),
    }
    for name, (image, expected) in cases.items():
        pack(tmp_path / name, [image] * 3, identities=3)
        found = PlainRecords(RecordDataset.open(tmp_path / name)).find(np.arange(3))
        assert found.labels.min() == 0, name
        assert (found.rows() is not None) == expected, name


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_batches_are_the_same_without_the_compiled_passes(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [encode(picture(number, SIZE), form) for number in range(40)]
    for number in (3, 17, 29):
        images[number] = images[number][: len(images[number]) * 2 // 3]  # decoders miss the end
    for number in range(0, 40, 2):
        middle = len(images[number]) // 2 + number
        images[number] = images[number][:middle] + b"\xff\xc4\1\0" + images[number][middle:]  # and look for it far off
    pack(tmp_path / "set", images, identities=40)

    def epoch() -> list[tuple[bytes, bytes]]:
        dataset = RecordDataset.open(tmp_path / "set")
        loader = TrainLoader(dataset, batch_size=8, image_size=SIZE, seed=1, max_damaged=1.0)
        batches = [next(loader) for _ in range(5)]
        loader.close()
        return [(batch.images.numpy().tobytes(), batch.samples.tobytes()) for batch in batches]

    with_passes = epoch()
    monkeypatch.setattr(plain_module, "compiled", lambda: None)
    assert epoch() == with_passes


def test_random_damage_is_never_read_the_short_way(folder: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    whole = RecordDataset.open(folder)
    recs = [shard.file.path for shard in whole.shards]
    for path in (*recs, *(rec.with_suffix(".idx") for rec in recs), folder / "dataset.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rec = tmp_path / recs[1].name
    stored = rec.read_bytes()
    heads = np.asarray(whole.shards[1].offsets)
    short = 0
    for turn in range(300):
        broken = bytearray(stored)
        at = int(random.choice(heads)) + int(random.integers(0, 36))
        if turn % 3:
            broken[at] ^= 1 << int(random.integers(8))
        elif turn % 2:
            broken[at : at + 4] = random.bytes(4)
        else:
            del broken[at + 400 :]
        rec.unlink()  # not overwritten, where a data set of an earlier turn has it mapped
        rec.write_bytes(broken)
        dataset = RecordDataset.open(tmp_path, strict=False)
        found = PlainRecords(dataset).find(np.arange(20, 40))
        for place in np.flatnonzero(found.labels >= 0).tolist():
            short += 1
            try:
                label, image = dataset.read(20 + place)
            except DamagedRecord as error:
                pytest.fail(f"turn {turn}, image {20 + place}: {error}")
            assert (found.labels[place], found[place].tobytes()) == (label, image.tobytes())
    assert short > 300 * 15
