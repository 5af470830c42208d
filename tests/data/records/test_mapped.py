"""Mapped files: no descriptor stays open, and a disk is asked for little more than what is read."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfc.data.loading import readahead
from pfc.data.loading import reader as slices
from pfc.data.loading.plain import compiled
from pfc.data.loading.readahead import ReadAhead
from pfc.data.loading.reader import SliceReader
from pfc.data.order.mixed import MixedOrder
from pfc.data.order.orders import BlockOrder, Order, SampleOrder
from pfc.data.records.dataset import RecordDataset
from pfc.data.records.joint import JointDataset
from pfc.data.records.recordio import RecordFile
from tests.data.pictures import encode, pack, picture

LIMITED = """
import os, resource, sys
from pfc.data import RecordDataset, UsageError

soft, hard, held = map(int, sys.argv[2:])
import pfc.data.records.dataset, pfc.data.records.labels
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    for _ in range(held):
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
try:
    dataset = RecordDataset.open(sys.argv[1])
except UsageError as error:
    sys.exit(f"refused: {error}")
print(sorted(dataset.label(i) for i in range(len(dataset))), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "set"
    pack(path, [encode(picture(i, (8, 8))) for i in range(100)], shards=100)
    return path


def opened_with(folder: Path, soft: int, hard: int, held: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, str(folder), str(soft), str(hard), str(held)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_set_may_have_more_shards_than_there_are_descriptors(folder: Path) -> None:
    done = opened_with(folder, 64, 64, 0)
    assert done.stdout.strip() == f"{sorted(i % 5 for i in range(100))} 64", done.stderr


def test_the_soft_limit_is_raised_when_it_is_reached(folder: Path) -> None:
    done = opened_with(folder, 64, 128, 100)
    assert done.stdout.strip() == f"{sorted(i % 5 for i in range(100))} 128", done.stderr


WRITING = """
import resource, sys
from pfc.data import ShardedWriter, UsageError

resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
try:
    with ShardedWriter(sys.argv[1], identities=2, image_size=None, source="test", shards=60) as writer:
        for image in range(60):
            writer.write(image % 2, b"image")
except UsageError as error:
    sys.exit(f"refused: {error}")
print(writer.shards)
"""


def test_a_set_may_be_written_into_more_shards_than_the_soft_limit_has_room_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITING, str(tmp_path / "set")]
    done = subprocess.run([*command, "256"], capture_output=True, text=True, timeout=120)
    assert done.stdout == "60\n", done.stderr
    assert len(list((tmp_path / "set").glob("*.rec"))) == 60
    command[-1] = str(tmp_path / "other")
    done = subprocess.run([*command, "64"], capture_output=True, text=True, timeout=120)
    assert "all 64 files that this process may have open are in use" in done.stderr
    assert done.stderr.startswith("refused: ")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_no_descriptor_left_is_one_clear_line(folder: Path) -> None:
    done = opened_with(folder, 64, 64, 100)
    assert done.stderr.startswith("refused: ")
    assert "all 64 files that this process may have open are in use: raise the limit (ulimit -n" in done.stderr
    assert done.stderr.count("\n") == 1


def test_mapped_bytes_outlive_their_file_and_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.rec").write_bytes(bytes(range(256)) * 40)
    open_before = len(os.listdir("/proc/self/fd"))
    file = RecordFile(tmp_path / "a.rec")
    assert len(os.listdir("/proc/self/fd")) == open_before
    part = file.bytes[5000:5010]
    with pytest.raises(ValueError, match="WRITEABLE"):
        file.bytes.flags.writeable = True
    del file
    assert part.tolist() == [i % 256 for i in range(5000, 5010)]


COLD_IMAGES = 1500


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> RecordDataset:
    """Images of 24 kB, none of them in the page cache."""
    path = tmp_path_factory.mktemp("cold") / "set"
    dataset = pack(path, [encode(picture(i, (90, 90))) for i in range(COLD_IMAGES)], shards=2)
    del dataset  # what is mapped stays
    for rec in path.glob("*.rec"):
        descriptor = os.open(rec, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    before = read_from_disk()
    dataset = RecordDataset.open(path)
    assert read_from_disk() - before < 3_000_000, "opening looks at a few records"
    return dataset


def read_from_disk() -> int:
    """Bytes that this process has had read from disks."""
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


def test_a_random_order_reads_what_it_knows_to_come_and_little_else(
    large: RecordDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "AHEAD", 64)
    order = SampleOrder(COLD_IMAGES, 0)
    reader = SliceReader(large, order, batch_size=8, rank=0, world_size=1, drop=False, position=0, image_size=None)
    before = read_from_disk()
    found = [reader.read() for _ in range(5)]
    fetched = read_from_disk() - before
    images = [len(image) for batch in found for image in batch.images]
    if fetched == 0 or compiled() is None:
        pytest.skip("the file system keeps its files in memory or does not count; or there is no compiled pass")
    mean = np.mean(images)
    known = 40 + 64  # samples: those that were read, and those that are known to come
    assert known * mean * 0.9 < fetched < known * (mean + 12_000)


@pytest.mark.parametrize("joint", [False, True])
def test_the_windows_that_come_are_asked_for_block_by_block(
    joint: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, int]] = []
    monkeypatch.setattr(RecordFile, "will_need", lambda self, low, high: asked.append((self.path.name, low, high)))
    monkeypatch.setattr(readahead, "ThreadPoolExecutor", AtOnce)
    dataset: Any = RecordDataset.open(folder)
    order: Order = BlockOrder(100, 0, block_size=10, window=20)
    if joint:
        dataset, order = JointDataset([dataset, dataset]), MixedOrder([order, SampleOrder(100, 0)], [1, 1])
    ahead = ReadAhead(dataset, order)
    ahead.move(0)
    samples = (order.orders[0] if isinstance(order, MixedOrder) else order).at(np.arange(40)).tolist()
    assert sorted(name for name, _, _ in asked) == sorted(f"train-{sample:05d}.rec" for sample in samples)
    ahead.move(1)
    assert len(asked) == 40, "each window once"
    ahead.move(50 if joint else 25)
    assert len(asked) == 60
    ahead.close()


class AtOnce:
    """In place of a thread."""

    def __init__(self, _: int) -> None: ...

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        function(*arguments)

    def shutdown(self, **_: bool) -> None: ...
