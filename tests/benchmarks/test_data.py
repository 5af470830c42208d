"""``pfc bench data`` and the merged index that DALI's own reader takes."""

import json
from pathlib import Path

import numpy as np
import pytest

from pfc.data import RecordDataset, pack_synthetic
from pfc.data.checking.merged_index import write_merged_index
from pfc.data.records.recordio import RecordWriter, pack_image
from pfc.launch.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "set"
    pack_synthetic(path, identities=9, images_per_identity=5, size=32, shards=3, workers=1)
    return path


def read_by_dali(recs: list[Path], index: Path, count: int) -> tuple[list[bytes], list[float]]:
    """What ``fn.readers.mxnet`` makes of the files: encoded images and labels, one after the other."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1)
    def reader():
        return tuple(fn.readers.mxnet(path=[str(rec) for rec in recs], index_path=[str(index)]))

    pipeline = reader(device_id=None)
    pipeline.build()
    images, labels = [], []
    for _ in range(count):
        image, label = pipeline.run()
        images.append(np.asarray(image.at(0)).tobytes())
        labels.append(float(np.asarray(label.at(0)).ravel()[0]))
    return images, labels


def test_dalis_own_reader_reads_our_shards_through_the_merged_index(folder: Path, tmp_path: Path) -> None:
    dataset = RecordDataset.open(folder)
    recs = write_merged_index(dataset, tmp_path / "merged.idx")
    assert len(recs) == 3
    images, labels = read_by_dali(recs, tmp_path / "merged.idx", len(dataset))
    assert labels == [dataset.label(i) for i in range(45)]
    assert images == [dataset.read(i)[1].tobytes() for i in range(45)]


def test_the_merged_index_leaves_header_and_identity_records_out(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, pack_image([5.0, 7.0], b""))
        for key in range(1, 5):
            writer.write(key, pack_image(float(key // 3), bytes([key]) * 40))
        writer.write(5, pack_image([1.0, 3.0], b""))
        writer.write(6, pack_image([3.0, 5.0], b""))
    dataset = RecordDataset.open(tmp_path)
    recs = write_merged_index(dataset, tmp_path / "merged.txt")
    images, labels = read_by_dali(recs, tmp_path / "merged.txt", 4)
    assert labels == [0, 0, 1, 1]
    assert images == [bytes([key]) * 40 for key in range(1, 5)]


def test_the_benchmark_measures_every_loader(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    options = ["--batch", "8", "--threads", "1", "--batches", "2", "--rounds", "2", "--json", str(figures)]
    assert main(["bench", "data", str(folder), *options]) == 0
    timings = json.loads(figures.read_text())
    assert [timing["loader"] for timing in timings] == [
        "DALI's reader, shuffled",
        "DALI's reader, in file order",
        "pfc, global order",
        "pfc, blocks order",
        "pfc, blocks order, cached",
        "torch DataLoader, Pillow",
    ]
    assert all(len(timing["images_per_second"]) == 2 and timing["ratio"] > 0 for timing in timings)
    assert [timing["processor_microseconds"] is not None for timing in timings] == [True] * 5 + [False]
    assert all(min(timing["processor_microseconds"]) > 0 for timing in timings[:4])
    out = capsys.readouterr().out
    assert "45 images of 32×32, 1 threads on cpu, decoded on the CPU, batches of 8" in out
    assert all(timing["loader"] in out for timing in timings)


def test_too_small_a_data_set_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data", str(folder)]) == 2
    assert "45 images, fewer than a batch of 128" in capsys.readouterr().err
