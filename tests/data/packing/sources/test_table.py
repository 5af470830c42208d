"""Packing tables: CSV, TSV and Parquet, with paths or with the images in a column."""

import builtins
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfc.data import RecordDataset, pack_table
from tests.data.packing.packed import contents, files_of, jpeg, refusal

NAMES = ["anna", "bob, the elder", 'carl "x"', "dora\tö"]


def write_images(folder: Path, count: int) -> list[str]:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}, {i}.jpg").write_bytes(jpeg(i))
    return [f"{i}, {i}.jpg" for i in range(count)]


def write_csv(path: Path, header: list[str], rows: list[list[str]], delimiter: str = ",") -> Path:
    def quoted(cell: str) -> str:
        return '"' + cell.replace('"', '""') + '"' if set(cell) & set(',"\t') else cell

    path.write_text("".join(delimiter.join(map(quoted, row)) + "\n" for row in [header, *rows]), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("seed", range(3))
def test_random_csv_reads_back(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    paths = write_images(tmp_path / "images", 20)
    labels = [NAMES[i] for i in random.integers(0, 4, 20)] if seed else [str(n) for n in random.integers(0, 99, 20)]
    kind, delimiter = (".tsv", "\t") if seed == 2 else (".csv", ",")
    table = write_csv(
        tmp_path / f"t{kind}",
        ["age", "who", "file"],
        [["7", label, path] for label, path in zip(labels, paths, strict=True)],
        delimiter,
    )
    summary = pack_table(
        table, tmp_path / "out", root=tmp_path / "images", path_column="file", label_column="who", size=8, workers=1
    )
    expected = Counter((label, jpeg(i)) for i, label in enumerate(labels))
    assert contents(tmp_path / "out") == expected
    assert (summary.images, summary.identities) == (20, len(set(labels)))
    in_order = sorted(set(labels)) if seed else sorted(set(labels), key=int)
    assert RecordDataset.open(tmp_path / "out").identity_names() == in_order


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (
            "path,label\na.jpg,1\n",
            {"path_column": "file"},
            "has no column file (--path-column); there are: path, label",
        ),
        ("file,label\na.jpg,1\n", {}, "has no column path or image: name the right one with --path-column"),
        ("path,who\na.jpg,1\n", {}, "has no column label: name the right one with --label-column; there are: path"),
        ("", {}, "has no column path or image"),
        ("path,label\n", {}, "lists no image"),
        ("path,label\n\na.jpg\n", {}, "line 3 has 1 columns, the header line has 2"),
        ("path,label\n,1\n", {}, "line 2 has no path"),
        ("path,label\na.jpg,\n", {}, "line 2 has no label"),
        ("path,label\n../a.jpg,1\n", {}, "line 2: ../a.jpg lies outside of the root"),
        ("path,label\na.jpg,anna\n", {"keep_labels": True}, "labels cannot be kept"),
    ],
)
def test_wrong_csv(lines: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = tmp_path / "in" / "t.csv"
    table.write_text(lines)
    assert message in refusal(pack_table, table, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_utf16_table_is_told_apart(encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "t.csv").write_text(f"{mark}path,label\na.jpg,1\n", encoding=encoding)
    line = refusal(pack_table, tmp_path / "t.csv", tmp_path / "out")
    assert line == f"{tmp_path / 't.csv'} is UTF-16: save it as UTF-8"


def test_text_that_only_looks_like_a_number_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "t.csv").write_text("path,label\na.jpg,1_000\na.jpg,١\na.jpg,7\n", encoding="utf-8")
    pack_table(tmp_path / "t.csv", tmp_path / "out", workers=1)
    assert RecordDataset.open(tmp_path / "out").identity_names() == ["1_000", "7", "١"]


def test_the_names_to_pack_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "t.csv").write_text("path,label\na.jpg,anna\na.jpg,bob\n")
    (tmp_path / "only.txt").write_text("anna\n", encoding="utf-8-sig")
    pack_table(tmp_path / "t.csv", tmp_path / "out", only=tmp_path / "only.txt", workers=1)
    assert RecordDataset.open(tmp_path / "out").identity_names() == ["anna"]


def test_other_files_are_no_tables(tmp_path: Path) -> None:
    (tmp_path / "t.xlsx").touch()
    assert "a table ends in .csv, .tsv or .parquet" in refusal(pack_table, tmp_path / "t.xlsx", tmp_path / "out")
    assert "no such table" in refusal(pack_table, tmp_path / "none.csv", tmp_path / "out")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_pyarrow(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    (tmp_path / "t.parquet").touch()
    line = refusal(pack_table, tmp_path / "t.parquet", tmp_path / "out")
    assert line.endswith("pip install 'pfc[parquet]'")


def test_parquet_with_paths(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    paths = write_images(tmp_path / "images", 10)
    parquet.write_table(arrow.table({"path": paths, "label": [i % 3 for i in range(10)]}), tmp_path / "t.parquet")
    pack_table(tmp_path / "t.parquet", tmp_path / "out", root=tmp_path / "images", size=8, workers=1)
    assert contents(tmp_path / "out") == {(str(i % 3), jpeg(i)): 1 for i in range(10)}
    odd = arrow.table({"path": paths, "label": arrow.array(NAMES * 2 + [None, "x"]).dictionary_encode()})
    parquet.write_table(odd, tmp_path / "null.parquet")
    assert "null.parquet: row 8 has no label" in refusal(pack_table, tmp_path / "null.parquet", tmp_path / "x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    assert "cannot be read as Parquet" in refusal(pack_table, tmp_path / "broken.parquet", tmp_path / "x")


@pytest.mark.parametrize("embedded", ["struct", "binary"])
def test_parquet_with_images_in_a_column(embedded: str, tmp_path: Path) -> None:
    """Several files, as Hugging Face's data sets have them, with the names of the labels in the schema."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    about = {"info": {"features": {"label": {"names": ["anna", "bob", "carl"], "_type": "ClassLabel"}}}}
    (tmp_path / "in" / "data").mkdir(parents=True)
    for part in range(2):
        images: list[Any] = [jpeg(10 * part + i) for i in range(10)]
        images[3] = b"no picture" if part else None
        if embedded == "struct":
            images = [{"bytes": image, "path": "x.jpg"} for image in images]
        table = arrow.table({"image": images, "label": [(part + i) % 3 for i in range(10)]})
        if embedded == "struct":
            table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
        parquet.write_table(table, tmp_path / "in" / "data" / f"train-{part}.parquet", row_group_size=4)
    summary = pack_table(tmp_path / "in", tmp_path / "out", size=8, workers=2)
    expected = {((part + i) % 3, jpeg(10 * part + i)): 1 for part in range(2) for i in range(10) if i != 3}
    names = ["anna", "bob", "carl"] if embedded == "struct" else ["0", "1", "2"]
    assert contents(tmp_path / "out") == {(names[label], image): 1 for label, image in expected}
    folder = tmp_path / "in" / "data"
    assert summary.skipped == [
        (f"{folder / 'train-0.parquet'}: row 3", "the table does not hold its bytes"),
        (f"{folder / 'train-1.parquet'}: row 3", "no image format starts like this"),
    ]
    assert set(files_of(tmp_path / "out")) == {
        "dataset.json",
        "labels.json",
        "property",
        "skipped.tsv",
        "train.rec",
        "train.idx",
    }


def test_large_images_in_parquet_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    random = np.random.default_rng(0)
    images = [random.bytes(100_000 if i < 10 else 400_000) for i in range(60)]
    table = arrow.table({"image": images, "label": [0] * 60})
    parquet.write_table(table, tmp_path / "t.parquet", compression="none", use_dictionary=False, write_batch_size=4)
    del table
    before = arrow.default_memory_pool()
    pool = arrow.proxy_memory_pool(before)
    monkeypatch.setattr("pfc.data.packing.sources.parquet._READ_AHEAD", 2_000_000)
    arrow.set_memory_pool(pool)
    try:
        pack_table(tmp_path / "t.parquet", tmp_path / "out", keep_bytes=True, check=False, workers=1)
    finally:
        arrow.set_memory_pool(before)
    assert contents(tmp_path / "out") == Counter(("0", image) for image in images)
    assert pool.max_memory() < 10_000_000  # of 21 million bytes


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "has no label"),
        (float("nan"), "has no label"),
        (-1, "label -1 is not a whole number from 0 on"),
        (-1.0, "label -1.0 is not a whole number from 0 on"),
        (0.5, "label 0.5 is not a whole number from 0 on"),
        (float("inf"), "label inf is not a whole number from 0 on"),
    ],
)
def test_a_parquet_label_that_is_none_is_no_identity(
    label: float | None, message: str, embedded: bool, tmp_path: Path
) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = b"x" if embedded else "x.jpg"
    parquet.write_table(arrow.table({"image": [image] * 3, "label": [2, 10, label]}), tmp_path / "t.parquet")
    assert f"t.parquet: row 2{'' if 'has' in message else ':'} {message}" in refusal(
        pack_table, tmp_path / "t.parquet", tmp_path / "out"
    )


def test_whole_labels_in_floats_are_numbers(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"image": [jpeg(i) for i in range(3)], "label": [10.0, 2.0, 10.0]})
    parquet.write_table(table, tmp_path / "t.parquet")
    pack_table(tmp_path / "t.parquet", tmp_path / "out", size=8, workers=1)
    assert contents(tmp_path / "out") == {("10", jpeg(0)): 1, ("2", jpeg(1)): 1, ("10", jpeg(2)): 1}
    assert RecordDataset.open(tmp_path / "out").identity_names() == ["2", "10"]


def test_images_in_a_dictionary_of_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = arrow.array([jpeg(0), jpeg(1), jpeg(0)]).dictionary_encode()
    parquet.write_table(arrow.table({"image": images, "label": [0, 1, 1]}), tmp_path / "t.parquet")
    pack_table(tmp_path / "t.parquet", tmp_path / "out", size=8, workers=1)
    assert contents(tmp_path / "out") == {("0", jpeg(0)): 1, ("1", jpeg(1)): 1, ("1", jpeg(0)): 1}


def test_images_of_parquet_that_are_only_paths_are_told_apart(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}]
    parquet.write_table(arrow.table({"image": images, "label": [0, 1]}), tmp_path / "t.parquet")
    line = refusal(pack_table, tmp_path / "t.parquet", tmp_path / "out")
    assert "none of its 2 images can be read" in line
    assert line.endswith("the table does not hold its bytes")
