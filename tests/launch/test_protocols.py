"""What a trained backbone, or embeddings from elsewhere, are worth by a protocol: evaluate and threshold."""

import json
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

from pfc.data.protocols.table import write_protocol
from pfc.launch.cli import main
from tests.commands import pfc
from tests.launch.test_cli import assert_wrong_use


@pytest.fixture(scope="module")
def table(folder: Path) -> Path:
    """Of the packed set's 24 images: the first of each identity is the gallery, two identities are in none."""
    labels = [image // 4 for image in range(24)]
    roles = ["gallery" if image % 4 == 0 and image < 16 else "probe" for image in range(24)]
    groups = ["north" if label % 2 else "south" for label in labels]
    path = folder / "find.csv"
    images = [f"set#{i}" for i in range(24)]
    columns = ["image", "identity", "role", "group"]
    write_protocol(path, columns, zip(images, labels, roles, groups, strict=True))
    return path


def test_a_protocol_on_one_rank_and_on_two(table: Path, run_dir: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    alone = pfc("evaluate", run_dir, "--protocol", table, "--json", "--report", report)
    shared = pfc("evaluate", run_dir, "--protocol", table, "--json", "--nproc", "2")
    assert (alone.error, shared.error) == ("", "")
    (expected,), (result,) = json.loads(alone.out), json.loads(shared.out)
    assert min(expected.pop("seconds"), result.pop("seconds")) > 0
    assert result == pytest.approx(expected, abs=1e-6)
    assert (expected["set"], expected["mated_probes"], expected["non_mated_probes"]) == ("find", 12, 8)
    assert expected["rank_1_low"] <= expected["rank_1"] <= expected["rank_1_high"]
    assert "rank-1 on find" in report.read_text()
    assert report.read_text().count("data:image/jpeg") >= 3


def test_embeddings_from_elsewhere_are_judged_by_the_same_code(
    table: Path, folder: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "made.npz"
    assert main(["embed", str(run_dir), str(folder / "set"), str(file)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run_dir), "--protocol", str(table), "--json"]) == 0
    (own,) = json.loads(capsys.readouterr().out)
    assert main(["evaluate", "--embeddings", str(file), "--protocol", str(table), "--json"]) == 0
    (given,) = json.loads(capsys.readouterr().out)
    del own["seconds"], given["seconds"]
    assert {**given, "precision": "float32"} == pytest.approx(own, abs=1e-6)

    stored = np.load(file)
    order = np.random.default_rng(0).permutation(24)  # by name, in any order
    names = np.array([f"set#{i}" for i in range(24)])
    np.savez(tmp_path / "named.npz", embeddings=stored["embeddings"][order], names=names[order])
    assert main(["evaluate", "--embeddings", str(tmp_path / "named.npz"), "--protocol", str(table), "--json"]) == 0
    (named,) = json.loads(capsys.readouterr().out)
    del named["seconds"]
    assert named == given

    assert main(["evaluate", "--embeddings", str(file)]) == 0  # by its own labels, each among all others
    printed = capsys.readouterr().out
    assert "made: 24 images, 24 queries" in printed
    assert "MAP@R" in printed

    pairs = folder / "pairs.bin"
    np.save(tmp_path / "of_pairs.npy", np.random.default_rng(1).normal(size=(40, 8)).astype(np.float32))
    assert main(["evaluate", "--embeddings", str(tmp_path / "of_pairs.npy"), "--pairs", str(pairs), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["pairs"] == 20


def test_the_threshold_of_one_set_and_what_it_gives_on_another(
    table: Path, folder: Path, run_dir: Path, tmp_path: Path
) -> None:
    report = tmp_path / "threshold.html"
    options = ["--on", table, "--fmr", "0.05", "--check", folder / "pairs.bin", "--bootstrap", "20"]
    ended = pfc("threshold", run_dir, *options, "--report", report)
    assert (ended.exit_code, ended.error) == (0, "")
    assert "for a false match rate of 0.05 on find" in ended.out
    assert "north" in ended.out
    assert "pairs, beside find:" in ended.out
    assert "Calibration" in report.read_text()
    told = json.loads(pfc("threshold", run_dir, *options, "--json").out)
    assert told["sets"][0]["fmr"] <= 0.05
    assert told["sets"][0]["impostor_pairs"] == 24 * 20 // 2
    assert told["sets"][1]["why"]


def test_wrong_use_is_told_in_one_line(
    table: Path, folder: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, find = str(run_dir), str(table)
    np.savez(tmp_path / "few.npz", embeddings=np.zeros((3, 4), np.float32))
    np.savez(tmp_path / "nan.npz", embeddings=np.full((24, 4), np.nan, np.float32))
    np.savez(tmp_path / "ints.npz", embeddings=np.zeros((24, 4), np.int64))
    np.savez(tmp_path / "short.npz", embeddings=np.zeros((24, 4), np.float32), labels=np.zeros(3, np.int64))
    np.savez(tmp_path / "named.npz", embeddings=np.zeros((2, 4), np.float32), names=np.array(["set#0", "set#1"]))
    np.savez(tmp_path / "twice.npz", embeddings=np.zeros((3, 4), np.float32), names=np.array(["a", "b", "a"]))
    (tmp_path / "text.npz").write_text("not an array")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "nan.npz").read_bytes()[:300])
    with ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "no array")
    lost = tmp_path / "lost.csv"
    lost.write_text("image,identity\nnowhere.png,1\nset#1,2\n")
    for arguments, told in (
        (["evaluate"], "give a run or a checkpoint, or --embeddings"),
        (["evaluate", run], "--pairs FILE.bin or --protocol TABLE"),
        (["evaluate", run, "--embeddings", str(tmp_path / "few.npz")], "give one of them"),
        (["evaluate", run, "--protocol", str(lost)], "no such data set"),
        (["evaluate", "--embeddings", str(tmp_path / "few.npz"), "--protocol", find], "3 embeddings for 24 images"),
        (
            ["evaluate", "--embeddings", str(tmp_path / "nan.npz"), "--protocol", find],
            "24 of 24 embeddings are not finite",
        ),
        (
            ["evaluate", "--embeddings", str(tmp_path / "ints.npz"), "--protocol", find],
            "it has: embeddings int64 [24, 4]",
        ),
        (["evaluate", "--embeddings", str(tmp_path / "short.npz")], "labels has the shape [3], for 24 embeddings"),
        (["evaluate", "--embeddings", str(tmp_path / "few.npz")], "has no labels"),
        (
            ["evaluate", "--embeddings", str(tmp_path / "named.npz"), "--protocol", find],
            "no embedding of 22 of 24 images",
        ),
        (["evaluate", "--embeddings", str(tmp_path / "twice.npz"), "--protocol", find], "names has a twice"),
        (["evaluate", "--embeddings", str(tmp_path / "text.npz")], "text.npz"),
        (["evaluate", "--embeddings", str(tmp_path / "empty.npz")], "empty.npz is no .npy or .npz file"),
        (["evaluate", "--embeddings", str(tmp_path / "cut.npz")], "cut.npz is no .npy or .npz file"),
        (["evaluate", "--embeddings", str(tmp_path / "other.npz")], "other.npz has no array embeddings"),
        (
            ["evaluate", run, "--pairs", str(folder / "pairs.bin"), "--report", str(tmp_path / "r.html")],
            "give --protocol",
        ),
        (["evaluate", run, "--protocol", find, "--report", find + "/r.html"], "name another folder"),
        (["evaluate", "--embeddings", str(tmp_path / "none.npz")], "no such file"),
        (["threshold", "--on", find], "give a run or a checkpoint, or --embeddings"),
        (["threshold", run, "--on", find, "--fmr", "0"], "--fmr 0: no threshold promises that"),
        (["threshold", run, "--on", find, "--fmr", "1e-6"], "1e-06 is less than one of 240 pairs"),
        (["threshold", run, "--on", find, "--check", find], "two sets are called 'find'"),
    ):
        assert_wrong_use(capsys, arguments, told)


def test_labels_that_stand_for_nobody_and_names_of_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    np.savez(tmp_path / "e.npz", embeddings=rows, labels=np.array([0, 0, 1, 1, -1, -1]))
    assert main(["evaluate", "--embeddings", str(tmp_path / "e.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["queries"] == 4
    np.savez(tmp_path / "n.npz", embeddings=rows, names=np.array([f"i{i}".encode() for i in range(6)]))
    (tmp_path / "t.csv").write_text("image,identity\n" + "".join(f"i{i},{i // 2}\n" for i in range(6)))
    given = ["--embeddings", str(tmp_path / "n.npz"), "--protocol", str(tmp_path / "t.csv")]
    assert main(["evaluate", *given, "--report", str(tmp_path / "r.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["queries"] == 6


def test_a_broken_picture_costs_the_report_alone_that_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(6):
        (tmp_path / f"i{i}").write_bytes(b"no picture")
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    np.save(tmp_path / "e.npy", rows)
    (tmp_path / "t.csv").write_text("image,identity\n" + "".join(f"i{i},{i // 2}\n" for i in range(6)))
    given = ["--embeddings", str(tmp_path / "e.npy"), "--protocol", str(tmp_path / "t.csv")]
    assert main(["evaluate", *given, "--report", str(tmp_path / "r.html")]) == 0
    assert "Recall@1" in capsys.readouterr().out
    assert "Recall@1" in (tmp_path / "r.html").read_text()
