"""``pfc embed`` into a folder: shards, which a killed run leaves whole or not at all."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfc.data import RecordDataset
from pfc.engine.sharing import shards
from pfc.launch.cli import main
from tests.commands import Command, pfc, run_pfc

SIZES = ["--shard-size", "5", "--batch-size", "2"]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_and_die(arguments: Sequence[str], at: int) -> int:
    """``pfc ARGUMENTS...``, killed when it has written the ``at``-th file and not yet given it its name."""
    written = 0

    def fsync(_: int) -> None:
        nonlocal written
        written += 1
        if written == at:
            os.kill(os.getpid(), signal.SIGKILL)

    shards.os.fsync = fsync  # in a process of its own
    return run_pfc(arguments)


@pytest.fixture(scope="module")
def photos(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 24 images of the set as files, two of which cannot be read."""
    photos = tmp_path_factory.mktemp("photos")
    dataset = RecordDataset.open(folder / "set")
    for number in range(len(dataset)):
        label, image = dataset.read(number)
        path = photos / f"{label}" / f"image {number}.PNG"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(image))
    Image.new("RGB", (50, 40), (200, 10, 10)).save(photos / "1.png")
    (photos / "3" / "broken.png").write_bytes(b"no image")
    (photos / "5" / "empty.jpg").write_bytes(b"")
    (photos / "notes.txt").write_text("none")
    return photos


def test_the_shards_are_the_one_file_in_pieces(folder: Path, run_dir: Path, photos: Path, tmp_path: Path, capsys):
    for source, kind, left in ((folder / "set", "labels", 0), (photos, "names", 2)):
        whole, out = tmp_path / f"{kind}.npz", tmp_path / kind
        assert main(["embed", str(run_dir), str(source), str(whole)]) == 0
        assert main(["embed", str(run_dir), str(source), str(out), *SIZES]) == 0
        expected, manifest = np.load(whole), json.loads((out / "manifest.json").read_text())
        files = [out / one["file"] for one in manifest["shards"]]
        rows = [np.load(file, mmap_mode="r") for file in files]
        assert [len(one) for one in rows] == [one["count"] for one in manifest["shards"]]
        np.testing.assert_allclose(np.concatenate(rows), expected["embeddings"], atol=1e-5)
        beside = [np.load(str(file).replace("embeddings", kind)) for file in files]
        np.testing.assert_array_equal(np.concatenate(beside), expected[kind])
        assert (manifest["count"], manifest["dim"], manifest["dtype"]) == (24 + (kind == "names"), 16, "float32")
        assert (manifest["left_out"], manifest["shard_size"]) == (left, 5)
        assert manifest["network"]["checkpoint"] == "step-00000002"
        assert str(tmp_path) not in json.dumps(manifest)
    numbers = [np.load(path) for path in sorted((tmp_path / "labels").glob("numbers-*.npy"))]
    np.testing.assert_array_equal(np.concatenate(numbers), np.arange(24))
    error = capsys.readouterr().err
    assert "3/broken.png: unreadable, left out: " in error
    assert "2 of 27 images left out" in error


@pytest.mark.parametrize("at", [1, 2, 4, 9, 16])
def test_a_killed_run_goes_on_and_ends_the_same(folder: Path, run_dir: Path, tmp_path: Path, at: int):
    line = ["embed", str(run_dir), str(folder / "set")]
    assert main([*line, str(tmp_path / "whole"), *SIZES]) == 0
    out = tmp_path / "out"
    killed = Command(run_and_die, [*line, str(out), *SIZES], at).wait()
    assert killed.exit_code == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    before = {path: path.stat().st_ino for path in out.glob("embeddings-*.npy")}
    assert len(before) == max(0, at - 2) // 3  # three files for each shard, after one for all
    again = pfc(*line, out, *SIZES)
    assert (again.exit_code, again.error) == (0, "")
    assert content(out) == content(tmp_path / "whole")
    assert all(path.stat().st_ino == number for path, number in before.items())
    assert "nothing is left to do" in pfc(*line, out, *SIZES).out


def test_two_ranks_write_what_one_does(run_dir: Path, photos: Path, tmp_path: Path):
    line = ["embed", str(run_dir), str(photos)]
    for number in ("1", "2"):
        ended = pfc(*line, tmp_path / number, *SIZES, "--nproc", number, environment={"OMP_NUM_THREADS": "1"})
        assert ended.exit_code == 0
        assert ended.out.count("wrote 25 embeddings of 16 numbers, float32, in 6 shard(s)") == 1
        assert ended.error.count("broken.png") == 1
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_a_shard_that_was_cut_off_is_made_again(folder: Path, run_dir: Path, tmp_path: Path):
    line = ["embed", str(run_dir), str(folder / "set"), str(tmp_path / "out"), *SIZES]
    assert Command(run_and_die, line, 16).wait().exit_code == -signal.SIGKILL
    first = tmp_path / "out" / "embeddings-00000.npy"
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    assert main(line) == 0
    assert first.read_bytes() == whole


@pytest.mark.parametrize("complete", [True, False])
def test_another_command_in_the_same_folder_is_refused(
    folder: Path, run_dir: Path, photos: Path, tmp_path: Path, complete: bool, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    line = ["embed", str(run_dir), str(folder / "set"), str(out), *SIZES]
    if complete:
        assert main(line) == 0
    else:
        assert Command(run_and_die, line, 6).wait().exit_code == -signal.SIGKILL
    before = content(out)
    other = tmp_path / "other"
    shutil.copytree(run_dir, other, symlinks=True)
    (checkpoint,) = (other / "checkpoints").glob("step-*")
    tensors = next(checkpoint.glob("*.distcp"))
    spoilt = bytearray(tensors.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    tensors.write_bytes(spoilt)
    capsys.readouterr()
    for changed, told in (
        ([line[0], str(run_dir), str(photos), *line[3:]], "other images"),
        ([*line, "--dtype", "float16"], "another --dtype"),
        ([*line, "--format", "parquet"], "another --format"),
        ([*line, "--no-flip"], "another choice of --flip"),
        ([line[0], str(other), *line[2:]], "another network or checkpoint"),
    ):
        assert main(changed) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert f"{out} has embeddings of {told}" in error
    assert content(out) == before


def test_float16_and_parquet(folder: Path, run_dir: Path, photos: Path, tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for dtype in ("float32", "float16"):
        assert main(["embed", str(run_dir), str(photos), str(tmp_path / f"{dtype}.npz"), "--dtype", dtype]) == 0
        expected = np.load(tmp_path / f"{dtype}.npz")
        assert expected["embeddings"].dtype == dtype
        options = ["--dtype", dtype, *SIZES]
        assert main(["embed", str(run_dir), str(photos), str(tmp_path / dtype), *options]) == 0
        plain = [np.load(path) for path in sorted((tmp_path / dtype).glob("embeddings-*.npy"))]
        assert {one.dtype for one in plain} == {np.dtype(dtype)}
        tables = tmp_path / f"{dtype} tables"
        assert main(["embed", str(run_dir), str(photos), str(tables), *options, "--format", "parquet"]) == 0
        table = parquet.read_table(sorted(tables.glob("*.parquet")))
        np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), np.concatenate(plain))
        assert table["name"].to_pylist() == expected["names"].tolist()
    assert main(["embed", str(run_dir), str(folder / "set"), str(tmp_path / "set"), *SIZES, "--format", "parquet"]) == 0
    table = parquet.read_table(sorted((tmp_path / "set").glob("*.parquet")))
    assert table["label"].to_pylist() == RecordDataset.open(folder / "set").labels().tolist()


def test_damaged_records_are_left_out(folder: Path, run_dir: Path, tmp_path: Path, capsys):
    shutil.copytree(folder / "set", tmp_path / "set")
    dataset = RecordDataset.open(tmp_path / "set")
    (rec,) = (tmp_path / "set").glob("*.rec")
    spoilt = bytearray(rec.read_bytes())
    at = spoilt.index(bytes(dataset.read(3)[1]))
    spoilt[at : at + 16] = bytes(16)
    at = spoilt.index(bytes(dataset.read(11)[1])) - 32  # its record's magic number
    spoilt[at : at + 4] = bytes(4)
    rec.write_bytes(spoilt)
    assert main(["embed", str(run_dir), str(tmp_path / "set"), str(tmp_path / "out"), *SIZES]) == 0
    numbers = np.concatenate([np.load(path) for path in sorted((tmp_path / "out").glob("numbers-*.npy"))])
    np.testing.assert_array_equal(numbers, np.delete(np.arange(24), [3, 11]))
    rows = np.concatenate([np.load(path) for path in sorted((tmp_path / "out").glob("embeddings-*.npy"))])
    assert main(["embed", str(run_dir), str(folder / "set"), str(tmp_path / "all.npy")]) == 0
    np.testing.assert_allclose(rows, np.load(tmp_path / "all.npy")[numbers], atol=1e-5)


def test_images_that_come_or_go_meanwhile_are_told(
    run_dir: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(photos, tmp_path / "photos")
    written = shards.Shards.write

    def write(self: shards.Shards, number: int, *given: object) -> None:
        written(self, number, *given)
        for path in sorted((tmp_path / "photos").rglob("*.*"))[-2:]:
            path.unlink()

    monkeypatch.setattr(shards.Shards, "write", write)
    assert main(["embed", str(run_dir), str(tmp_path / "photos"), str(tmp_path / "out"), "--shard-size", "4"]) == 2
    assert "images were added, removed or changed while it was embedded" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_wrong_use_of_a_folder(folder: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("precious")
    (tmp_path / "empty").mkdir()
    for arguments, told in (
        ([str(folder / "set"), str(tmp_path / "full")], "is not empty, and holds no embeddings"),
        ([str(tmp_path / "empty"), str(tmp_path / "out")], "holds no image"),
        ([str(folder / "set"), str(tmp_path / "a.npz"), "--shard-size", "3"], "for a folder of files"),
        ([str(folder / "set"), str(tmp_path / "a.txt")], "give a new .npz or .npy file, or a folder"),
    ):
        assert main(["embed", str(run_dir), *arguments]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert told in error
    (tmp_path / "empty" / "a.png").write_bytes(b"no image")
    assert main(["embed", str(run_dir), str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert "no image could be read" in capsys.readouterr().err
    assert (tmp_path / "full" / "precious").read_text() == "precious"
    assert not list(tmp_path.glob("a.*"))
