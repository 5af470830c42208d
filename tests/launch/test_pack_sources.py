"""The pack verbs for what a person brings: their options reach the packing, wrong use is one line."""

import json
from pathlib import Path

import pytest

from pfc.data import RecordDataset
from pfc.launch.cli import main
from tests.data.packing.packed import contents, jpeg
from tests.launch.test_cli import assert_wrong_use

FAST = ["--workers", "1"]


def write_source(root: Path) -> Path:
    """Six images of three identities, as a folder, a list file and a table."""
    for i in range(6):
        path = root / "images" / f"p{i % 3}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    rows = [(i, i % 3, f"images/p{i % 3}/{i}.jpg") for i in range(6)]
    (root / "all.lst").write_text("".join(f"{i}\t{label}\t{path}\n" for i, label, path in rows))
    (root / "all.csv").write_text("file,who\n" + "".join(f"{path},p{label}\n" for _, label, path in rows))
    return root


@pytest.mark.parametrize("verb", ["list", "recordio", "table"])
def test_help_teaches(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--min-images", "--shards", "--seed", "--keep-labels", "--strict"))


def test_all_sources_give_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_source(tmp_path / "in")
    line = ["--size", "8", "--shards", "2", "--seed", "3", *FAST]
    assert main(["pack", "folder", str(root / "images"), str(tmp_path / "a"), *line]) == 0
    assert main(["pack", "list", str(root / "all.lst"), str(tmp_path / "b"), *line]) == 0
    columns = ["--path-column", "file", "--label-column", "who"]
    assert main(["pack", "table", str(root / "all.csv"), str(tmp_path / "c"), *line, *columns]) == 0
    assert capsys.readouterr().out.count("packed 6 images of 3 identities into 2 shard(s)") == 3
    assert contents(tmp_path / "a") == contents(tmp_path / "c") == {(f"p{i % 3}", jpeg(i)): 1 for i in range(6)}
    assert contents(tmp_path / "b") == {(str(i % 3), jpeg(i)): 1 for i in range(6)}
    assert main(["pack", "recordio", *(str(tmp_path / name) for name in "ac"), str(tmp_path / "d"), *FAST]) == 0
    assert RecordDataset.open(tmp_path / "d").identity_names() == ["a/p0", "a/p1", "a/p2", "c/p0", "c/p1", "c/p2"]
    shared = ["--labels", "shared", "--images-per-shard", "5", "--no-shuffle", "--name", "all"]
    assert (
        main(["pack", "recordio", *(str(tmp_path / name) for name in "ac"), str(tmp_path / "e"), *FAST, *shared]) == 0
    )
    assert contents(tmp_path / "e") == contents(tmp_path / "a") + contents(tmp_path / "c")
    about = json.loads((tmp_path / "e" / "dataset.json").read_text())
    assert (about["name"], len(about["shards"]), about["creation"]["shuffle"]) == ("all", 3, False)


def test_wrong_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_source(tmp_path / "in")
    out = str(tmp_path / "out")
    for arguments, told in (
        (["list", str(root / "none.lst"), out], "none.lst"),
        (["list", str(root / "all.lst"), out, "--root", str(root / "images")], "none of its 6 images"),
        (["list", str(root / "all.lst"), out, "--keep-bytes", "--size", "8"], "choose one of both"),
        (["list", str(root / "all.csv"), out], "line 1"),
        (["table", str(root / "all.csv"), out], "--path-column"),
        (["table", str(root / "all.lst"), out], "a table ends in"),
        (["recordio", str(root), out], "holds no .rec"),
        (["recordio", out], "SRC"),
        (["folder", str(root / "images"), out, "--min-images", "3"], "nothing to pack"),
        (["folder", str(root / "images"), out, "--shards", "7"], "7 shards for 6 images"),
        (["folder", str(root / "images"), str(root / "images" / "out")], "one in the other"),
    ):
        assert_wrong_use(capsys, ["pack", *arguments, *FAST], told)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
