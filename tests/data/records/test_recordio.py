"""RecordIO framing and image records: MXNet's bytes, and nothing wrong taken for right."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfc.data.errors import DamagedRecord, UsageError
from pfc.data.records.recordio import (
    MAGIC_BYTES,
    MAX_PAYLOAD,
    RecordFile,
    RecordWriter,
    frame,
    pack_image,
    unpack_image,
)

# What MXNet 1.9.1 wrote for these (labels, id, image).
MXNET_IMAGES = [
    (3.0, 0, b"abcde"),
    ([2.0, 9.0], 1, b"xy" + MAGIC_BYTES + b"z"),  # the magic, not at a multiple of 4
    (1.0, 2, MAGIC_BYTES + b"wxyz" + MAGIC_BYTES + MAGIC_BYTES + b"q"),
]
MXNET_REC = bytes.fromhex(
    "0a23d7ce1d00000000000000000040400000000000000000000000000000000061626364650000000a23d7ce2700000002000000"
    "0000000001000000000000000000000000000000000000400000104178790a23d7ce7a000a23d7ce18000020000000000000803f"
    "020000000000000000000000000000000a23d7ce040000407778797a0a23d7ce000000400a23d7ce0100006071000000"
)
MXNET_IDX = "0\t0\n1\t40\n2\t88\n"

payloads = st.lists(st.one_of(st.just(MAGIC_BYTES), st.just(bytes(4)), st.binary(max_size=9)), max_size=8).map(b"".join)


def write(path: Path, records: list[bytes]) -> list[int]:
    with RecordWriter(path) as writer:
        return [writer.write(key, record) for key, record in enumerate(records)]


def test_writes_what_mxnet_writes(tmp_path: Path) -> None:
    write(tmp_path / "a.rec", [pack_image(labels, image, id=id) for labels, id, image in MXNET_IMAGES])
    assert (tmp_path / "a.rec").read_bytes() == MXNET_REC
    assert (tmp_path / "a.idx").read_text() == MXNET_IDX


def test_reads_what_mxnet_writes(tmp_path: Path) -> None:
    (tmp_path / "a.rec").write_bytes(MXNET_REC)
    file = RecordFile(tmp_path / "a.rec")
    for (labels, id, image), line in zip(MXNET_IMAGES, MXNET_IDX.splitlines(), strict=True):
        record = unpack_image(file.read(int(line.split()[1])))
        assert list(record.labels) == (labels if isinstance(labels, list) else [labels])
        assert record.flag == (2 if isinstance(labels, list) else 0)
        assert record.id == id
        assert record.image.tobytes() == image


@given(records=st.lists(payloads, min_size=1, max_size=4))
def test_any_payload_comes_back(records: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rec") / "a.rec"
    offsets = write(path, records)
    file = RecordFile(path)
    assert [file.read(offset).tobytes() for offset in offsets] == records
    assert [file.end(offset) for offset in offsets] == [*offsets[1:], file.size]
    stored = path.read_bytes()
    assert len(stored) % 4 == 0
    starts = [at for at in range(0, len(stored), 4) if stored[at : at + 4] == MAGIC_BYTES]
    assert len(starts) == sum(1 + len(_aligned(record)) for record in records)  # the magic only heads frames


def _aligned(payload: bytes) -> list[int]:
    return [at for at in range(0, len(payload) - 3, 4) if payload[at : at + 4] == MAGIC_BYTES]


def test_writer_counts_and_hashes(tmp_path: Path) -> None:
    import hashlib

    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.write(7, b"one")
        writer.write(9, b"three")
    stored = (tmp_path / "a.rec").read_bytes()
    assert (writer.records, writer.size) == (2, len(stored))
    assert writer.sha256 == hashlib.sha256(stored).hexdigest()
    assert (tmp_path / "a.idx").read_text() == "7\t0\n9\t12\n"


def test_damaged_frames_are_refused_and_the_others_still_read(tmp_path: Path) -> None:
    records = [b"a" * 10, b"b" * 8 + MAGIC_BYTES + b"b" * 5, b"c" * 12, b"d" * 3]
    path = tmp_path / "a.rec"
    offsets = write(path, records)
    whole = path.read_bytes()
    listed = set(offsets).__contains__
    for hurt, offset in enumerate(offsets):
        for place in range(offset, offset + 8):
            for bit in range(8):
                stored = bytearray(whole)
                stored[place] ^= 1 << bit
                path.write_bytes(stored)
                file = RecordFile(path)
                for key, record in enumerate(records):
                    if key != hurt:
                        assert file.read(offsets[key], key=key, listed=listed).tobytes() == record
                if place - offset == 4 and bit < 2 and len(records[hurt]) % 4:
                    continue  # nothing tells apart lengths that end in the same four bytes
                with pytest.raises(DamagedRecord, match=f"key {hurt} at byte {offset}: ") as caught:
                    file.read(offset, key=hurt, listed=listed)
                assert (caught.value.shard, caught.value.key, caught.value.offset) == (path, hurt, offset)


def test_truncated_file_loses_only_its_end(tmp_path: Path) -> None:
    records = [b"a" * 10, MAGIC_BYTES + b"b" * 5, b"c" * 12]
    path = tmp_path / "a.rec"
    offsets = write(path, records)
    whole = path.read_bytes()
    ends = [*offsets[1:], len(whole)]
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        file = RecordFile(path)
        for key, record in enumerate(records):
            if ends[key] <= size:
                assert file.read(offsets[key], listed=set(offsets).__contains__).tobytes() == record
            elif size < ends[key] - (-len(record) % 4):  # more than its padding is missing
                with pytest.raises(DamagedRecord, match="runs past the end"):
                    file.read(offsets[key], key=key)


def test_a_part_of_a_record_is_no_record(tmp_path: Path) -> None:
    write(tmp_path / "a.rec", [b"abcd" + MAGIC_BYTES + b"efgh"])
    file = RecordFile(tmp_path / "a.rec")
    assert file.starts_record(0)
    assert not file.starts_record(12)
    with pytest.raises(DamagedRecord, match="not its start"):
        file.read(12)


def test_short_image_records_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.rec", [b"short", pack_image([1.0, 2.0], b"")[:-4]])
    file = RecordFile(tmp_path / "a.rec")
    with pytest.raises(ValueError, match="too few"):
        unpack_image(file.read(0))
    with pytest.raises(ValueError, match="announces 2 labels"):
        unpack_image(file.read(16))


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        RecordFile(tmp_path / "none.rec")
    (tmp_path / "empty.rec").touch()
    with pytest.raises(UsageError, match="is empty"):
        RecordFile(tmp_path / "empty.rec")


def test_a_record_too_long_is_refused() -> None:
    class Long(bytes):
        def __len__(self) -> int:
            return MAX_PAYLOAD + 1

    with pytest.raises(UsageError, match="at most 536870911 bytes"):
        frame(Long())


def test_the_error_of_a_damaged_record_can_be_sent_between_processes() -> None:
    error = DamagedRecord(Path("a.rec"), 7, 12, "broken")
    sent = pickle.loads(pickle.dumps(error))
    assert str(sent) == str(error) == "a.rec: key 7 at byte 12: broken"
    assert (sent.shard, sent.key, sent.offset, sent.reason) == (Path("a.rec"), 7, 12, "broken")
