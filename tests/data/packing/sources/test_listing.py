"""Packing im2rec's list files."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pfc.data import RecordDataset, pack_list
from tests.data.packing.packed import contents, jpeg, refusal


def write_list(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("seed", range(4))
def test_random_lists_read_back(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 60))
    labels = random.choice(random.integers(0, 2**40, 7), count)
    expected: Counter[tuple[str, bytes]] = Counter()
    lines = []
    (tmp_path / "images" / "deep er").mkdir(parents=True)
    for i, label in enumerate(labels.tolist()):
        path = f"{'deep er/' if i % 2 else ''}{i} ä.jpg"
        (tmp_path / "images" / path).write_bytes(jpeg(1000 * seed + i))
        lines.append("\t".join([str(3 * i), f"{label}.000000" if i % 3 else str(label), *["0.5"] * (i % 4), path]))
        expected[str(label), jpeg(1000 * seed + i)] += 1
    listed = write_list(tmp_path / "some.lst", [lines[i] for i in random.permutation(count)])
    summary = pack_list(listed, tmp_path / "out", root=tmp_path / "images", size=8, workers=1)
    assert (summary.images, summary.identities) == (count, len(set(labels.tolist())))
    assert contents(tmp_path / "out") == expected
    assert RecordDataset.open(tmp_path / "out").identity_names() == [str(n) for n in np.unique(labels)]


def test_the_root_is_the_folder_of_the_list_and_labels_may_stay(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "b.png").write_bytes(jpeg(2, kind="PNG"))
    listed = write_list(tmp_path / "some.lst", ["0\t2147483647\ta.jpg", "", f"1\t16777217\t{tmp_path}/b.png\r"])
    pack_list(listed, tmp_path / "out", keep_bytes=True, keep_labels=True, workers=1)
    assert contents(tmp_path / "out") == {("2147483647", jpeg(1)): 1, ("16777217", jpeg(2, kind="PNG")): 1}
    ds = RecordDataset.open(tmp_path / "out")
    assert (ds.num_classes, ds.label_encoding, ds.identity_names()) == (2**31, "float32x2", None)


def test_missing_files_are_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "empty.jpg").touch()
    listed = write_list(tmp_path / "some.lst", ["0\t0\ta.jpg", "1\t0\tnone.jpg", "2\t1\tempty.jpg", "3\t1\t."])
    summary = pack_list(listed, tmp_path / "out", size=8, workers=1)
    assert summary.skipped == [
        (".", "is a directory"),
        ("empty.jpg", "it is empty"),
        ("none.jpg", "no such file or directory"),
    ]
    assert (summary.images, summary.identities, summary.empty_identities) == (1, 2, ["1"])
    assert (tmp_path / "out" / "skipped.tsv").read_text().startswith(".\tis a directory\nempty.jpg\t")
    line = refusal(pack_list, listed, tmp_path / "strict", size=8, strict=True)
    assert line.endswith("(packing is strict)")
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "lists no image"),
        (["0\ta.jpg"], "line 1 has 2 column(s)"),
        (["0\t0\ta.jpg", "0 0 a.jpg"], "line 2 has 1 column(s)"),
        (["0\tanna\ta.jpg"], "label 'anna' is not a whole number"),
        (["0\t0.5\ta.jpg"], "label '0.5' is not a whole number"),
        (["0\tnan\ta.jpg"], "label 'nan' is not a whole number"),
        (["0\t-1\ta.jpg"], "label '-1' is not a whole number"),
        (["0\t1_000\ta.jpg"], "label '1_000' is not a whole number"),
        (["1_0\t1\ta.jpg"], "index '1_0' is not a whole number"),
        (["0\t١\ta.jpg"], "label '١' is not a whole number"),
        (["0\t1e30\ta.jpg"], "label '1e30' is not a whole number"),
        (["x\t0\ta.jpg"], "index 'x' is not a whole number"),
        (["7\t0\ta.jpg", "8\t0\ta.jpg", "7\t1\ta.jpg"], "index 7 stands in line 1 and again in line 3"),
        (["0\t0\t"], "line 1 has no path"),
        (["0\t0\t../a.jpg"], "line 1: ../a.jpg lies outside of the root"),
        (["0\t0\tb/../../a.jpg"], "lies outside of the root"),
        (["0\t0\t/etc/passwd"], "lies outside of the root"),
    ],
)
def test_wrong_lists(lines: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    listed = write_list(tmp_path / "some.lst", lines)
    assert message in refusal(pack_list, listed, tmp_path / "out", root=tmp_path / "root")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "some.lst"]


def test_wrong_places(tmp_path: Path) -> None:
    listed = write_list(tmp_path / "some.lst", ["0\t0\ta.jpg"])
    assert "no such file" in refusal(pack_list, tmp_path / "none.lst", tmp_path / "out")
    assert "is a directory" in refusal(pack_list, tmp_path, tmp_path.parent / "out")
    assert "no such folder; give the one" in refusal(pack_list, listed, tmp_path / "out", root=tmp_path / "none")
    assert "none of its 1 images can be read, e.g. a.jpg: no such file" in refusal(pack_list, listed, tmp_path / "out")
    assert "is a file" in refusal(pack_list, listed, listed)
