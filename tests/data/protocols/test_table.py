"""The table of a protocol: what is read is what was written, and every mistake is one line that says where."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfc.data.alignment import LANDMARK_COLUMNS
from pfc.data.errors import UsageError
from pfc.data.protocols.images import open_images
from pfc.data.protocols.table import ROLES, read_protocol, write_protocol

HEADER = ("image", "identity", "template", "media", "camera", "gallery", "role", "weight", "group", *LANDMARK_COLUMNS)
POINTS = [str(number + 0.25) for number in range(10)]
ROWS = [
    ["a.jpg", "anna", "1", "9", "c1", "G1", "gallery", "0.5", "dark", *POINTS],
    ["b, c.jpg", "anna", "1", "8", "c1", "G1", "gallery", "1", "dark", *[""] * 10],
    ["ö.jpg", 'bob "b"', "2", "9", "c2", "", "probe", "0", "", *POINTS],
    ["d.jpg", "", "3", "", "", "", "distractor", "2e-3", "light", *POINTS],
]


def refusal(function: Any, *arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_parquet(path: Path, header: Any, rows: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns: dict[str, list[Any]] = {
        name: [value or None for value in column] for name, column in zip(header, zip(*rows, strict=True), strict=True)
    }
    for name in ("weight", *LANDMARK_COLUMNS):
        if name in columns:
            columns[name] = [None if value is None else float(value) for value in columns[name]]
    parquet.write_table(arrow.table(columns), path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_round_trip(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"faces.{kind}"
    write_protocol(tmp_path / "faces.csv", HEADER, ROWS, [("1", "2", 0), ("1", "1", 1), ("3", "2", 0)])
    if kind == "parquet":
        as_parquet(path, HEADER, ROWS)
    elif kind == "tsv":
        path.write_text("".join("\t".join(cells).replace('"', "'") + "\n" for cells in [HEADER, *ROWS]))
    if kind != "csv":
        (tmp_path / "faces.csv").unlink()
    protocol = read_protocol(path)
    bob = 'bob "b"' if kind != "tsv" else "bob 'b'"
    assert (protocol.name, protocol.folder, len(protocol)) == ("faces", tmp_path, 4)
    assert list(protocol.images) == ["a.jpg", "b, c.jpg", "ö.jpg", "d.jpg"]
    assert protocol.names["identity"] == ["anna", bob]
    assert protocol.identity.tolist() == [0, 0, 1, -1]
    assert [ROLES[code] for code in protocol.role] == ["gallery", "gallery", "probe", "distractor"]
    for name, codes in {
        "template": [0, 0, 1, 2],
        "media": [0, 1, 0, -1],
        "camera": [0, 0, 1, -1],
        "gallery": [0, 0, -1, -1],
        "group": [0, 0, -1, 1],
    }.items():
        assert getattr(protocol, name).tolist() == codes
    assert protocol.weight is not None
    assert protocol.weight.tolist() == pytest.approx([0.5, 1, 0, 2e-3])
    assert protocol.landmarks is not None
    assert np.isnan(protocol.landmarks[:, 0, 0]).tolist() == [False, True, False, False]
    assert protocol.landmarks[3].ravel().tolist() == [float(x) for x in POINTS]
    assert protocol.pairs is not None
    assert protocol.pairs.first.tolist() == [0, 0, 2]
    assert protocol.pairs.second.tolist() == [1, 0, 1]
    assert protocol.pairs.same.tolist() == [False, True, False]
    assert protocol.has("probe")
    assert not protocol.has("query")
    assert read_protocol(path, tmp_path / "images").folder == tmp_path / "images"


def test_synonyms_and_columns_that_nobody_asked_for(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("age,path,label\n7,a.jpg,x\n8,b.jpg,y\n9,c.jpg,x\n")
    protocol = read_protocol(tmp_path / "t.csv")
    assert (list(protocol.images), protocol.identity.tolist()) == (["a.jpg", "b.jpg", "c.jpg"], [0, 1, 0])
    assert protocol.template is protocol.weight is protocol.landmarks is protocol.pairs is None
    assert not protocol.role.any()
    (tmp_path / "u.csv").write_text("path,image,label,identity\na.jpg,b.jpg,x,y\n")
    assert list(read_protocol(tmp_path / "u.csv").images) == ["b.jpg"]  # the table's own names come first
    assert read_protocol(tmp_path / "u.csv").names["identity"] == ["y"]


def test_missing_numbers_of_parquet_are_nothing(tmp_path: Path) -> None:
    """As pandas writes a column of numbers with gaps."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"image": ["a", "b"], "media": [3.0, float("nan")]}), tmp_path / "t.parquet")
    media = read_protocol(tmp_path / "t.parquet").media
    assert media is not None
    assert media.tolist() == [0, -1]


def test_pairs_of_images_where_there_are_no_templates(tmp_path: Path) -> None:
    write_protocol(tmp_path / "t.csv", ["image"], [["a"], ["b"]], [("b", "a", 1)])
    (tmp_path / "t.pairs.csv").write_text("same,second,first\nTrue,a,b\nFalse,a,a\n")
    pairs = read_protocol(tmp_path / "t.csv").pairs
    assert pairs is not None
    assert (pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist()) == ([1, 0], [0, 0], [True, False])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,who\na,b\n", "t.csv has no column image (or path): a protocol names its images; there are: file, who"),
        ("", "t.csv has no column image (or path)"),
        ("image\n", "t.csv lists no image: it is empty"),
        ("image,identity\na,x\n,x\n", "t.csv: line 3 has no image"),
        ("image,identity\na,x\nb,y\na,x\n", "t.csv: line 4: a is the same row as line 2: remove one"),
        ("image,identity\na,x\na,y\n", "t.csv: line 3: a is the same row as line 2"),
        ("image,identity\na,x\nb\n", "t.csv: line 3 has 1 columns, the header line has 2"),
        ("image,role\na,probe\nb,prob\n", "t.csv: line 3: role prob: allowed are gallery, probe, query, distractor"),
        ("image,weight\na,1\nb,heavy\n", "t.csv: line 3: weight heavy is no number from 0 on"),
        ("image,weight\na,-1\n", "t.csv: line 2: weight -1 is no number from 0 on"),
        ("image,weight\na,inf\n", "t.csv: line 2: weight inf is no number from 0 on"),
        ("image,weight\na,1e39\n", "t.csv: line 2: weight 1e39 is no number from 0 on"),
        ("image,template,group\na,1,x\nb,1,y\n", "t.csv: template 1 has two groups"),
        ("image,role\na,\nb,distractor\n", "t.csv has distractors, but no probe or query"),
        ("image,role,gallery\na,gallery,G\nb,gallery,\nc,probe,\n", "t.csv: b is of a gallery without a name"),
        ("image,image\na,b\n", "t.csv has two columns image: rename one"),
        ('image,"role\na,b\n' + "x" * 140_000, "t.csv: line 1: field larger than field limit"),
        ("image,x1,y1\na,1,2\n", "t.csv has landmarks, but no column x2: five points are x1, y1, ..., x5, y5"),
        (f"image,{','.join(LANDMARK_COLUMNS)}\na,1,2,3,4,5,6,7,8,9,\n", "t.csv: line 2 has no y5: give all ten"),
        (f"image,{','.join(LANDMARK_COLUMNS)}\na,1,2,3,4,5,6,7,8,9,x\n", "t.csv: line 2: y5 x is no number"),
        (
            "image,identity,role\na,x,distractor\nb,x,probe\nc,x,gallery\n",
            "t.csv: a is a distractor of identity x, which is searched for",
        ),
        ("image,role\na,probe\nb,\n", "t.csv has probes or queries, but no gallery to find them in"),
        ("image,role\na,query\nb,\n", "t.csv has probes or queries, but no gallery to find them in"),
        ("image,role\na,gallery\nb,\n", "t.csv has a gallery, but no probe or query to find in it"),
        ("image,role\na,gallery\nb,probe\nc,query\n", "t.csv has probes and queries: make a table of each"),
        ("image,template\na,1\nb,\n", "t.csv: b has no template, as the others have"),
        ("image,template,identity\na,1,x\nb,1,y\n", "t.csv: template 1 has two identities"),
        ("image,template,identity\na,1,x\nb,1,\n", "t.csv: template 1 has two identities"),
        (
            "image,template,role\na,1,probe\nb,1,gallery\n",
            "t.csv: template 1 has two roles: a template is one person's, in one place",
        ),
        ("image,template,camera\na,1,2\nb,1,3\n", "t.csv: template 1 has two cameras"),
        ("image,template,gallery\na,1,G1\nb,1,G2\n", "t.csv: template 1 has two galleries"),
    ],
)
def test_wrong_tables(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    assert refusal(read_protocol, tmp_path / "t.csv").startswith(f"{tmp_path}/{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("first,second\n1,2\n", "has no column same: pairs have first, second, same"),
        ("first,second,same\n", "lists no pair: it is empty"),
        ("first,second,same\n1,2,1\n1,2,yes\n", ": line 3: same is yes: write 0 or 1"),
        ("first,second,same\n1,2,1\n1,7,0\n", ": line 3: template 7 has no image in the table"),
        ("first,second,same\n1,2,1\n1,2\n", ": line 3 has 2 columns, the header line has 3"),
    ],
)
def test_wrong_pairs(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,template\na,1\nb,2\n")
    (tmp_path / "t.pairs.csv").write_text(text)
    told = refusal(read_protocol, tmp_path / "t.csv")
    assert told.startswith(f"{tmp_path / 't.pairs.csv'}{'' if message[0] == ':' else ' '}{message}")
    (tmp_path / "t.csv").write_text("image\n1\n2\n")
    assert refusal(read_protocol, tmp_path / "t.csv") == told.replace("template 7", "image 7")


def test_what_is_no_table(tmp_path: Path) -> None:
    assert "no such table" in refusal(read_protocol, tmp_path / "t.csv")
    (tmp_path / "t.txt").touch()
    assert "a table ends in .csv, .tsv or .parquet" in refusal(read_protocol, tmp_path / "t.txt")


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path) -> None:
    assert "ends in .csv" in refusal(write_protocol, tmp_path / "t.tsv", ["image"], [["a"]])
    (tmp_path / "t.pairs.csv").touch()
    assert "t.pairs.csv exists already" in refusal(write_protocol, tmp_path / "t.csv", ["image"], [["a"]])
    (tmp_path / "t.pairs.csv").rename(tmp_path / "t.csv")
    assert "t.csv exists already" in refusal(write_protocol, tmp_path / "t.csv", ["image"], [["a"]])
    (tmp_path / "t.csv").unlink()

    def failing() -> Any:
        yield "a", "a", 1
        raise UsageError("no more")

    assert refusal(write_protocol, tmp_path / "deep" / "t.csv", ["image"], [["a"]], failing()) == "no more"
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_empty_weight_is_one(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,template,weight\na,1,\nb,1,0.5\n")
    protocol = read_protocol(tmp_path / "t.csv")
    assert protocol.weight is not None
    assert protocol.weight.tolist() == [1, 0.5]


def test_pairs_of_an_image_with_two_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,role\na,probe\na,gallery\nb,gallery\n")
    (tmp_path / "t.pairs.csv").write_text("first,second,same\na,b,1\n")
    assert "a has two rows in the table" in refusal(read_protocol, tmp_path / "t.csv")
    assert read_protocol(tmp_path / "t.csv", pairs=False).pairs is None


def test_names_that_are_no_files_names_are_missing_images(tmp_path: Path) -> None:
    for name in ("x" * 300, "photo#" + "9" * 30):
        assert "1 of 1 images are not there" in refusal(open_images, [name], tmp_path)


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"image": [f"{i}.png" for i in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    content[40:4000] = bytes(3960)
    path.write_bytes(content)
    assert refusal(read_protocol, path).startswith(f"{path} is damaged: ")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "name another folder" in refusal(write_protocol, tmp_path / "file" / "t.csv", ["image"], [["a"]])
