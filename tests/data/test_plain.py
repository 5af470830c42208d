"""The short way to plain records gives what RecordDataset.read gives, or nothing."""

from pathlib import Path

import numpy as np
import pytest

from pfc.data.dataset import RecordDataset
from pfc.data.errors import DamagedRecord
from pfc.data.mixture import JointDataset
from pfc.data.plain import PlainRecords
from pfc.data.recordio import RecordWriter, pack_image
from tests.data.pictures import encode, pack, picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "set"
    pack(path, [encode(picture(i, (8, 8))) for i in range(60)], identities=7, shards=3)
    return path


def test_a_packed_set_is_plain(folder: Path) -> None:
    dataset = RecordDataset.open(folder)
    plain = PlainRecords(dataset)
    for index in range(60):
        found = plain.read(index)
        assert found is not None
        label, image = dataset.read(index)
        assert (found[0], found[1].tobytes()) == (label, image.tobytes())


def test_joint_sets_have_joint_labels(folder: Path) -> None:
    joint = JointDataset([RecordDataset.open(folder)] * 2)
    plain = PlainRecords(joint)
    assert [(plain.read(index) or (None,))[0] for index in range(120)] == joint.labels().tolist()


def test_other_records_are_left_to_the_data_set(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.write(0, pack_image([3.0, 9.0], b"two labels"))
        writer.write(1, pack_image(1.0, (0xCED7230A).to_bytes(4, "little") * 3 + b"in parts"))
        writer.write(2, pack_image(2.5, b"no label"))
        writer.write(3, pack_image(2.0, b"plain"))
        writer.write(4, pack_image(2.0, b""))
    (tmp_path / "property").write_text("5,1,1")
    plain = PlainRecords(RecordDataset.open(tmp_path))
    assert [plain.read(index) is not None for index in range(5)] == [False, False, False, True, False]


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
        plain = PlainRecords(dataset)
        for index in range(20, 40):
            found = plain.read(index)
            if found is None:
                continue
            short += 1
            try:
                label, image = dataset.read(index)
            except DamagedRecord as error:
                pytest.fail(f"turn {turn}, image {index}: {error}")
            assert (found[0], found[1].tobytes()) == (label, image.tobytes())
    assert short > 300 * 15
