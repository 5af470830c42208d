"""``pfc overlap`` and ``pfc clean`` from the command line."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from pfc.data import Pairs, RecordDataset, ShardedWriter, write_pairs
from pfc.launch.cli import main


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def written(out: Path, dataset: RecordDataset, images: list[tuple[int, int]], names: list[str]) -> Path:
    """A set of (label, number in ``dataset``)."""
    with ShardedWriter(out, identities=names, image_size=(32, 32), source="test") as writer:
        for label, number in images:
            writer.write(label, bytes(dataset.read(number)[1]))
    return out


def test_overlap(folder: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    dataset = RecordDataset.open(folder / "set")
    labels = dataset.labels()
    images = [(int(label), i) for i, label in enumerate(labels)]
    train = written(tmp_path / "train", dataset, images, ["é", "b", "c", "d", "e", "f"])
    fourth = np.flatnonzero(labels == 3).tolist()
    test = written(tmp_path / "test", dataset, [(0, fourth[0]), (0, fourth[1]), (1, fourth[2])], ["x", "é"])
    out, new = tmp_path / "out", tmp_path / "new"
    command = ["overlap", str(train), str(test), str(out), "--run", str(run_dir)]
    assert main([*command, "--threshold", "-1", "--duplicate", "1"]) == 0
    told = capsys.readouterr().out
    files = ["duplicates.csv", "overlap.csv", "report.html", "without.txt", "without_images.txt"]
    assert sorted(path.name for path in out.iterdir()) == files
    copies = [row for row in read(out / "duplicates.csv") if row["same_bytes"] == "1"]
    assert {(row["train_image"], row["test_image"]) for row in copies} == {(str(fourth[i]), str(i)) for i in range(3)}
    pairs = read(out / "overlap.csv")
    assert {row["train_identity"] for row in pairs} == {"é", "b", "c", "d", "e", "f"}
    named = [row for row in pairs if row["same_name"] == "1"]
    assert [(row["train_identity"], row["test_identity"]) for row in named] == [("é", "é")]
    assert (out / "without.txt").read_text(encoding="utf-8") == "é\nb\nc\nd\ne\nf\n"
    assert "6 of 6 training identities are likely in" in told
    assert "1 have the name of an identity there: 1 of these" in told
    assert (out / "report.html").read_text(encoding="utf-8").count("data:image/jpeg") >= 2 * (len(pairs) + 3)

    pack = ["pack", "recordio", str(train), str(new), "--keep-labels"]
    assert main([*pack, "--without-images", str(out / "without_images.txt")]) == 0
    packed = RecordDataset.open(new)
    kept = {bytes(packed.read(i)[1]) for i in range(len(packed))}
    assert not kept & {bytes(dataset.read(i)[1]) for i in fourth[:3]}

    # By default what is shared stands above what TRAIN's own identities reach with each other.
    shutil.rmtree(out)
    assert main(command) == 0
    limit = float(capsys.readouterr().out.split("threshold ")[1].split(",")[0])
    listed = {row["train_identity"] for row in read(out / "overlap.csv") if float(row["cosine"]) >= limit - 5e-5}
    assert set((out / "without.txt").read_text(encoding="utf-8").split()) == listed


def test_overlap_with_a_verification_set(folder: Path, run_dir: Path, tmp_path: Path):
    dataset = RecordDataset.open(folder / "set")
    chosen = [5, 17, 20, 2]
    images = [bytes(dataset.read(i)[1]) for i in chosen]
    write_pairs(tmp_path / "few.bin", Pairs(images, np.array([True, False]), "few"))
    command = ["overlap", str(folder / "set"), str(tmp_path / "few.bin"), str(tmp_path / "out"), "--run", str(run_dir)]
    assert main([*command, "--duplicate", "1"]) == 0
    copies = [row for row in read(tmp_path / "out" / "duplicates.csv") if row["same_bytes"] == "1"]
    assert {(int(row["train_image"]), int(row["test_image"])) for row in copies} == set(
        zip(chosen, range(4), strict=True)
    )
    assert {row["test_identity"] for row in read(tmp_path / "out" / "overlap.csv")} <= {"0", "1", "2", "3"}


def test_clean(folder: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, dataset = tmp_path / "out", RecordDataset.open(folder / "set")
    labels = dataset.labels()
    first = np.flatnonzero(labels == 1).tolist()
    images = [(int(label), i) for i, label in enumerate(labels)]
    images += [(6, first[i]) for i in range(4)]  # one identity a second time
    images += [(7, first[0])] * 3 + [(7, int(np.flatnonzero(labels == 4)[0]))] * 4  # two in one label
    doubled = written(tmp_path / "doubled", dataset, images, list("abcdefgh"))
    assert main(["clean", str(doubled), str(out), "--run", str(run_dir), "--alike", "0.999999"]) == 0
    told = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["merged.csv", "outliers.txt", "report.html", "split.csv"]
    assert ("b", "g") in {(row["label_a"], row["label_b"]) for row in read(out / "merged.csv")}
    numbers = np.loadtxt(out / "outliers.txt", dtype=np.int64, ndmin=1)
    assert f"{len(numbers)} of 35 images are likely of another identity" in told
    assert "8 labels" in told
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "b / g 1.000" in page
    assert "right" not in page.split("</style>")[1]  # nothing here is right or wrong
    pack = ["pack", "recordio", str(doubled), str(tmp_path / "new")]
    assert main([*pack, "--without-images", str(out / "outliers.txt")]) == 0
    assert len(RecordDataset.open(tmp_path / "new")) == 35 - len(numbers)


def test_damaged_images_are_named_and_the_others_keep_their_numbers(
    folder: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(folder / "set", tmp_path / "set")
    dataset = RecordDataset.open(tmp_path / "set")
    (rec,) = (tmp_path / "set").glob("*.rec")
    content = bytearray(rec.read_bytes())
    for number in (0, 7):
        at = content.index(bytes(dataset.read(number)[1]))
        content[at : at + 16] = bytes(16)  # an image without its header
    rec.write_bytes(content)
    out = tmp_path / "out"
    command = ["overlap", str(tmp_path / "set"), str(folder / "set"), str(out), "--run", str(run_dir)]
    assert main([*command, "--duplicate", "1"]) == 0
    told = capsys.readouterr().err
    assert "image 0 is left out" in told
    assert "image 7 is left out" in told
    assert "2 of 24 images are left out" in told
    copies = [row for row in read(out / "duplicates.csv") if row["same_bytes"] == "1"]
    expected = [str(i) for i in range(24) if i not in (0, 7)]
    assert sorted((row["train_image"] for row in copies), key=int) == expected
    assert all(row["train_image"] == row["test_image"] for row in copies)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("overlap {set} {no} {out} --run {run}", "no such data set"),
        ("overlap {set} {no}.bin {out} --run {run}", "does not exist"),
        ("overlap {set} {config} {out} --run {run}", "neither a directory nor a .rec file"),
        ("overlap {set} {set} {out} --run {no}", "{no}"),
        ("overlap {set} {set} {out}", "--run"),
        ("overlap {set} {set} {out} --run {run} --threshold 2", "--threshold"),
        ("overlap {set} {set} {set} --run {run}", "exists already"),
        ("overlap {set} {set} {config}/out --run {run}", "a file is where its folder should be"),
        ("overlap {one} {set} {out} --run {run}", "the set has one identity"),
        ("clean {no} {out} --run {run}", "no such data set"),
        ("clean {set} {set} --run {run}", "exists already"),
        ("clean {set} {out} --run {run} --outlier 2", "--outlier"),
        ("clean {one} {out} --run {run}", "the set has one identity"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    folder: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, problem: str
):
    places = {"set": folder / "set", "run": run_dir, "no": tmp_path / "no", "out": tmp_path / "out"}
    places |= {"config": folder / "tiny.yaml", "one": tmp_path / "one"}
    written(tmp_path / "one", RecordDataset.open(folder / "set"), [(0, 0), (0, 1)], ["a"])
    assert main(arguments.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert problem.format(**places) in error
    assert len(error.splitlines()) <= 2  # the second names the help
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
