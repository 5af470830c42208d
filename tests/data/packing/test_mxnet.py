"""MXNet 1.9.1 itself, in a virtual environment of its own, judges the files: each reads what the other writes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pfc.data.packing.writer import ShardedWriter
from pfc.data.records.dataset import RecordDataset
from pfc.data.records.recordio import MAGIC_BYTES, RecordFile, RecordWriter, pack_image, unpack_image

BODIES = [
    b"plain",
    MAGIC_BYTES,
    MAGIC_BYTES * 3,
    MAGIC_BYTES + b"at the start",
    b"at the end  " + MAGIC_BYTES,
    b"between " + MAGIC_BYTES + b"again..." + MAGIC_BYTES + MAGIC_BYTES + b"z",
    b"x" + MAGIC_BYTES + b"not at a multiple of 4",
    MAGIC_BYTES[:3],
]
"""What stands where an image would; the head of 24 bytes before it keeps multiples of 4 where they are."""

LABELS: list[float | list[float]] = [0.0, [1.0, 9.0], 2.0, 16777215.0, [3.0, 0.5, -1.0], 4.0, 5.0, 6.0]

WRITE = """
import json, sys
import mxnet as mx
rec = mx.recordio.MXIndexedRecordIO(sys.argv[1] + ".idx", sys.argv[1] + ".rec", "w")
for key, label, id, body in json.load(open(sys.argv[2])):
    flag = len(label) if isinstance(label, list) else 0
    rec.write_idx(key, mx.recordio.pack(mx.recordio.IRHeader(flag, label, id, 0), bytes.fromhex(body)))
rec.close()
"""
READ = """
import json, sys
import mxnet as mx
rec = mx.recordio.MXIndexedRecordIO(sys.argv[1] + ".idx", sys.argv[1] + ".rec", "r")
found = []
for key in rec.keys:
    header, body = mx.recordio.unpack(rec.read_idx(key))
    label = header.label.tolist() if header.flag else float(header.label)
    found.append([key, label, header.id, body.hex()])
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def mxnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has MXNet 1.9.1; the tests are skipped where pip cannot bring it."""
    folder = tmp_path_factory.mktemp("mxnet") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    wanted = ["mxnet==1.9.1", "numpy<1.24"]
    try:
        done = subprocess.run([*pip, "install", "--quiet", *wanted], capture_output=True, text=True, timeout=300)
        reason = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired:
        reason = ["it took longer than 300 s"]
    if reason:
        pytest.skip(f"pip cannot install {' '.join(wanted)} here: {reason[0]}")
    return python


def run(python: Path, code: str, *arguments: Path) -> str:
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def records(*, insightface: bool) -> list[tuple[int, float | list[float], int, bytes]]:
    """(key, label, id, body) of a data set in either convention."""
    first = 1 if insightface else 0
    images = [(first + i, label, first + i, body) for i, (label, body) in enumerate(zip(LABELS, BODIES, strict=True))]
    if not insightface:
        return images
    stop, identities = len(images) + 1, len(images)
    own = [(stop + i, [1.0 + i, 2.0 + i], stop + i, b"") for i in range(identities)]
    return [(0, [float(stop), float(stop + identities)], 0, b""), *images, *own]


@pytest.mark.parametrize("insightface", [False, True])
def test_what_mxnet_writes_is_read_and_is_what_pfc_writes(mxnet: Path, tmp_path: Path, insightface: bool) -> None:
    written = records(insightface=insightface)
    (tmp_path / "list.json").write_text(json.dumps([[*record[:3], record[3].hex()] for record in written]))
    (tmp_path / "m").mkdir()
    run(mxnet, WRITE, tmp_path / "m" / "train", tmp_path / "list.json")
    ds = RecordDataset.open(tmp_path / "m")
    assert len(ds) == len(BODIES)
    assert [(header is not None, n) for header, n in [(ds.shards[0].header, ds.shards[0].identity_records)]] == [
        (insightface, len(BODIES) if insightface else 0)
    ]
    for i, (label, body) in enumerate(zip(LABELS, BODIES, strict=True)):
        record = ds.shards[0].read_image(ds.shards[0].first + i)
        assert list(record.labels) == (label if isinstance(label, list) else [label])
        assert record.image.tobytes() == body
    with RecordWriter(tmp_path / "p.rec") as writer:
        for key, label, id, body in written:
            writer.write(key, pack_image(label, body, id=id))
    assert (tmp_path / "p.rec").read_bytes() == (tmp_path / "m" / "train.rec").read_bytes()
    assert (tmp_path / "p.idx").read_bytes() == (tmp_path / "m" / "train.idx").read_bytes()


@pytest.mark.parametrize("insightface", [False, True])
def test_mxnet_reads_what_pfc_writes(mxnet: Path, tmp_path: Path, insightface: bool) -> None:
    written = records(insightface=insightface)
    with RecordWriter(tmp_path / "p.rec") as writer:
        for key, label, id, body in written:
            writer.write(key, pack_image(label, body, id=id))
    found = json.loads(run(mxnet, READ, tmp_path / "p"))
    assert found == [[*record[:3], record[3].hex()] for record in written]


def test_mxnet_reads_a_packed_data_set(mxnet: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.bytes(int(size)) + MAGIC_BYTES for size in rng.integers(0, 300, 40)]
    with ShardedWriter(tmp_path / "s", identities=7, image_size=None, source="test", shards=2) as writer:
        for i, image in enumerate(images):
            writer.write(i % 7, image)
    for shard in range(2):
        found = json.loads(run(mxnet, READ, tmp_path / "s" / f"train-{shard:05d}"))
        assert found == [[i, float(i % 7), i, images[i].hex()] for i in range(shard, 40, 2)]


def test_payloads_of_any_kind_pass_both_ways(mxnet: Path, tmp_path: Path) -> None:
    """Payloads without an image's head, which start with the magic themselves."""
    code = """
import sys
import mxnet as mx
source = mx.recordio.MXRecordIO(sys.argv[1], "r")
out = mx.recordio.MXRecordIO(sys.argv[2], "w")
while (payload := source.read()) is not None:
    out.write(payload)
out.close()
"""
    with RecordWriter(tmp_path / "p.rec") as writer:
        offsets = [writer.write(key, body) for key, body in enumerate([*BODIES, pack_image(1.0, b"last")])]
    run(mxnet, code, tmp_path / "p.rec", tmp_path / "m.rec")
    assert (tmp_path / "m.rec").read_bytes() == (tmp_path / "p.rec").read_bytes()
    file = RecordFile(tmp_path / "m.rec")
    assert [file.read(at, listed=set(offsets).__contains__).tobytes() for at in offsets[:-1]] == BODIES
    assert unpack_image(file.read(offsets[-1])).image.tobytes() == b"last"
