"""``pfc pack protocol``: the options reach the functions, what is made can be packed, wrong use is one line."""

from pathlib import Path

import numpy as np
import pytest

from pfc.data import RecordDataset
from pfc.data.protocols.table import read_protocol
from pfc.launch.cli import main
from tests.data.packing.packed import make_source, pack_it
from tests.data.pictures import encode, picture
from tests.data.protocols.test_made import POINTS, roles, touch, write_ijb
from tests.launch.test_cli import assert_wrong_use

KINDS = ("records", "ijb", "market", "sop", "tinyface", "megaface", "trials")


@pytest.mark.parametrize("kind", KINDS)
def test_help_names_what_it_reads(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "protocol", kind, "--help"]) == 0
    out = capsys.readouterr().out
    assert "OUT.csv" in out
    assert {"records": "SET", "trials": "LIST"}.get(kind, "FOLDER") in out


def test_options_of_a_packed_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        pack_it(make_source(tmp_path / "in" / name), tmp_path / name)
    verb = ["pack", "protocol", "records", str(tmp_path / "a")]
    more = ["--gallery-images", "3", "--non-mated", "0.25", "--seed", "2", "--most-distractors", "7"]
    assert main([*verb, str(tmp_path / "t.csv"), *more, "--distractors", str(tmp_path / "b")]) == 0
    assert "9 gallery" in capsys.readouterr().out
    found = roles(read_protocol(tmp_path / "t.csv"))
    assert (found.count("gallery"), found.count("distractor")) == (3 * 3, 7)
    assert main([*verb, str(tmp_path / "r.csv"), "--retrieval"]) == 0
    assert set(roles(read_protocol(tmp_path / "r.csv"))) == {""}


def test_ijb_is_aligned_and_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_ijb(tmp_path / "IJBC")
    for number in range(1, 11):
        (folder / "loose_crop" / f"{number}.jpg").write_bytes(encode(picture(number, (130, 120)), "JPEG"))
    assert main(["pack", "protocol", "ijb", str(folder), str(folder / "ijbc.csv"), "--set", "IJBC"]) == 0
    assert "4 pairs, 2 of them matching" in capsys.readouterr().out
    verb = ["pack", "table", str(folder / "ijbc.csv"), str(tmp_path / "out"), "--workers", "1"]
    assert main([*verb, "--label-column", "identity", "--align", "--size", "112x96"]) == 0
    dataset = RecordDataset.open(tmp_path / "out")
    assert (len(dataset), dataset.num_classes, dataset.image_size) == (10, 3, (112, 96))
    assert np.bincount(dataset.labels()).tolist() == [4, 4, 2]


def test_other_published_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "m", "query/0001_c1s1_1.jpg", "bounding_box_test/0001_c2s1_1.jpg")
    touch(tmp_path / "t", "Probe/1_1.jpg", "Gallery_Match/1_2.jpg", "Gallery_Distractor/a.jpg")
    touch(tmp_path / "s", "Ebay_test.txt", "p/1.jpg", "p/2.jpg", "d/1.jpg")
    (tmp_path / "s" / "Ebay_test.txt").write_text("1 1 1 p/1.jpg\n2 1 1 p/2.jpg\n")
    (tmp_path / "p.json").write_text('{"path": ["p/1.jpg", "p/2.jpg"]}')
    (tmp_path / "d.json").write_text('{"path": ["d/1.jpg"]}')
    (tmp_path / "trials.txt").write_text("a b target\na c nontarget\n")
    lists = ["--probes", str(tmp_path / "p.json"), "--distractors", str(tmp_path / "d.json")]
    for kind, source, more, images in (
        ("market", "m", [], 2),
        ("tinyface", "t", [], 3),
        ("sop", "s", [], 2),
        ("megaface", "s", lists, 3),
        ("trials", "trials.txt", [], 3),
    ):
        out = tmp_path / f"{kind}.csv"
        assert main(["pack", "protocol", kind, str(tmp_path / source), str(out), *more]) == 0
        assert f"wrote {images} images" in capsys.readouterr().out
        assert len(read_protocol(out)) == images


def test_wrong_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_ijb(tmp_path / "IJBC")
    (tmp_path / "trials.txt").write_text(f"a b\n{POINTS}\n")
    out = str(tmp_path / "t.csv")
    for arguments, told in (
        (["ijb", str(folder), out], "--set"),
        (["ijb", str(folder), out, "--set", "IJBA"], "IJBA"),
        (["ijb", str(tmp_path / "none"), out, "--set", "IJBC"], "holds no meta"),
        (["ijb", str(folder), str(tmp_path / "t.tsv"), "--set", "IJBC"], "ends in .csv"),
        (["trials", str(tmp_path / "trials.txt"), out], "line 1 has 2 fields"),
        (["records", str(tmp_path / "none"), out], "no such data set"),
        (["records", str(tmp_path / "none"), out, "--non-mated", "2"], "--non-mated"),
        (["megaface", str(folder), out], "--probes"),
    ):
        assert_wrong_use(capsys, ["pack", "protocol", *arguments], told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["IJBC", "trials.txt"]
