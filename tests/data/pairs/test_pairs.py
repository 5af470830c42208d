"""Verification sets: .bin files read without running their code, pairs chosen fairly, lists read with line numbers."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfc.data.errors import UsageError
from pfc.data.glyphs.synthetic import pack_synthetic
from pfc.data.packing.writer import ShardedWriter
from pfc.data.pairs.pairs import Pairs, make_pairs, pairs_from_list, read_pairs, write_pairs
from pfc.data.pairs.plain_pickle import load_plain
from pfc.data.records.dataset import RecordDataset
from pfc.launch.cli import main

IMAGES = [f"image {i}".encode() for i in range(6)]
SAME = [True, False, True]


def pack(folder: Path, labels: list[int]) -> RecordDataset:
    """A packed set whose "images" are their label and number, as text."""
    with ShardedWriter(folder, identities=max(labels) + 1, image_size=None, source="test") as writer:
        for number, label in enumerate(labels):
            writer.write(label, f"{label} {number}".encode())
    return RecordDataset.open(folder)


def write_bin(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def jpeg(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


# -- reading and writing


def test_a_set_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_pairs(tmp_path / "lfw.bin", Pairs(IMAGES, np.array(SAME), "any"))
    images, same = pickle.loads((tmp_path / "lfw.bin").read_bytes())  # what the field's own tools see
    assert (images, same) == (IMAGES, SAME)
    pairs = read_pairs(tmp_path / "lfw.bin")
    assert pairs.images == IMAGES
    assert pairs.same.dtype == np.bool_
    assert pairs.same.tolist() == SAME
    assert pairs.name == "lfw"
    with pytest.raises(UsageError, match="exists already"):
        write_pairs(tmp_path / "lfw.bin", pairs)
    assert [path.name for path in tmp_path.iterdir()] == ["lfw.bin"]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["bytes", "arrays", "numpy flags", "flag array", "integers", "object array"])
def test_the_forms_that_sets_come_in(tmp_path: Path, protocol: int, kind: str) -> None:
    images: object = IMAGES
    same: object = SAME
    if kind == "arrays":
        images = [np.frombuffer(image, dtype=np.uint8) for image in IMAGES]
    elif kind == "numpy flags":
        same = [np.bool_(flag) for flag in SAME]
    elif kind == "flag array":
        same = np.array(SAME)
    elif kind == "object array":
        images = np.array(IMAGES, dtype=object)
    elif kind == "integers":
        same = [int(flag) for flag in SAME]
    pairs = read_pairs(write_bin(tmp_path / "set.bin", (images, same), protocol))
    assert pairs.images == IMAGES
    assert pairs.same.tolist() == SAME


def test_sets_pickled_by_python_2(tmp_path: Path) -> None:
    def string(value: bytes) -> bytes:  # Python 2's str: opcode SHORT_BINSTRING
        return b"U" + bytes([len(value)]) + value

    array = (  # numpy.array([7, 255], dtype='u1'), as Python 2 wrote it
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R(K\x01K\x02\x85"
        b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|") + b"NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + string(b"\x07\xff") + b"tb"
    )
    data = b"\x80\x02](" + string(b"\xff\xd8 one") + array + b"e](\x88e\x86."
    (tmp_path / "old.bin").write_bytes(data)
    pairs = read_pairs(tmp_path / "old.bin")
    assert pairs.images == [b"\xff\xd8 one", b"\x07\xff"]
    assert pairs.same.tolist() == [True]
    (tmp_path / "text.bin").write_bytes(b"((lp0\nS'\\xff\\xd8 one'\np1\naS'\\x07'\np2\na(lp3\nI01\nat.")
    assert read_pairs(tmp_path / "text.bin").images == [b"\xff\xd8 one", b"\x07"]


class Attack:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "named"), [(os.system, r"(posix|nt)\.system"), (eval, "eval"), (getattr, "getattr")]
)
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, protocol: int, function: object, named: str) -> None:
    victim = tmp_path / "victim"
    path = write_bin(tmp_path / "evil.bin", ([Attack(function, f"touch {victim}"), b"x"], [True]), protocol)
    with pytest.raises(UsageError, match=named):
        read_pairs(path)
    assert not victim.exists()


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(I0\ntS'b'\n\x87R"
OBJECTS = b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI%d\ntb"


def nested(levels: int) -> object:
    """A few hundred bytes of pickle that stand for 10^levels entries."""
    return [nested(levels - 1)] * 10 if levels else [b"x"]


HOSTILE = {
    "lists of the same lists": pickle.dumps((nested(30), [True] * 5)),
    "objects that are lists of the same lists": ARRAY
    + b"(I1\n(I10\nt%bI00\n%btb." % (OBJECTS % 63, pickle.dumps(nested(30), protocol=0)[:-1]),
    "deep lists": b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
    "the same text as bytes again": b"\x80\x02c_codecs\nencode\nq\x01(X\xff\x00\x00\x00%bq\x00" % (b"x" * 255)
    + b"h\x01h\x00\x85R" * 200
    + b"l\x88\x85\x86.",
    "objects from bytes": ARRAY + b"(I1\n(I1\nt" + OBJECTS % 0 + b"I00\nS'AAAAAAAA'\ntb.",
    "more objects than there are": ARRAY + b"(I1\n(I1099511627776\nt" + OBJECTS % 63 + b"I00\n]tb.",
    "a huge array": ARRAY + b"(I1\n(I1099511627776\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\nS''\ntb.",
    "items of no size": b"cnumpy\ndtype\n(S'S0'\nI0\nI1\ntR.",
    "fields": b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nN(S'a'\nt}I8\nI1\nI0\ntb.",
    "a huge table": b"\x80\x02]r\xff\xff\xff\x7f.",
    "huge bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x3f.",
    "a list in itself": b"(lp0\ng0\na.",
    "bytes by their number": b"c__builtin__\nbytes\n(I1099511627776\ntR.",
    "another code": b"c__builtin__\nbytes\n(N}V__code__\nI1\nstb.",
    "other defaults": b"c__builtin__\nbytes\n(N}V__defaults__\n(tstb.",
    "raw memory": ARRAY + b"(I1\n(I1\ntcnumpy\ndtype\n(S'V8'\nI0\nI1\ntRI00\nS'AAAAAAAA'\ntb.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_plain_names_are_no_way_around(tmp_path: Path, kind: str) -> None:
    (tmp_path / "evil.bin").write_bytes(HOSTILE[kind])
    with pytest.raises(UsageError, match=r"was not loaded|is not a verification set") as caught:
        read_pairs(tmp_path / "evil.bin")
    assert "\n" not in str(caught.value)
    assert ("a table of 2147483647 entries" in str(caught.value)) == (kind == "a huge table")  # refused unread
    assert ("numpy arrays of |V8" in str(caught.value)) == (kind == "raw memory")
    assert ("asks for more bytes than it holds" in str(caught.value)) == (kind == "the same text as bytes again")
    assert load_plain(pickle.dumps(b"", protocol=2)) == b""
    test_a_set_comes_back_as_it_was_written(_new(tmp_path))  # and what was tried leaves no trace


def _new(tmp_path: Path) -> Path:
    (tmp_path / "new").mkdir()
    return tmp_path / "new"


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_image_that_comes_often_is_in_memory_once(tmp_path: Path, protocol: int) -> None:
    image = np.arange(100, dtype=np.uint8)
    pairs = read_pairs(write_bin(tmp_path / "set.bin", ([image] * 600, [True] * 300), protocol))
    assert len(pairs.images) == 600
    assert {id(encoded) for encoded in pairs.images} == {id(pairs.images[0])}
    assert pairs.images[0] == image.tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "does not hold"),
        (([], []), "0 images and 0 flags"),
        ((IMAGES[:5], SAME), "5 images and 3 flags"),
        (([b"x", ""], [True]), "image 1 is not"),
        (([b"x", b""], [True]), "image 1 is not"),
        (([b"x", b"y"], [2]), "flag 0"),
        (([b"x", b"y"], ["yes"]), "flag 0"),
    ],
)
def test_what_is_no_verification_set_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_pairs(write_bin(tmp_path / "set.bin", content))


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_pairs(tmp_path / "none.bin")
    with pytest.raises(UsageError, match=r"a directory: give a \.bin file"):
        read_pairs(tmp_path)
    whole = pickle.dumps((IMAGES, SAME), protocol=4)
    for content in (b"", b"\xff\xd8 a picture", whole[: len(whole) // 2]):
        (tmp_path / "bad.bin").write_bytes(content)
        with pytest.raises(UsageError, match="cannot be unpickled"):
            read_pairs(tmp_path / "bad.bin")


# -- choosing pairs


def identities(pairs: Pairs) -> np.ndarray:
    """int64 [P, 2]: the labels of each pair's images."""
    return np.array([int(image.split()[0]) for image in pairs.images]).reshape(-1, 2)


def test_half_of_the_pairs_match_and_none_comes_twice(tmp_path: Path) -> None:
    pairs = make_pairs(pack(tmp_path / "set", list(range(30)) * 8), 400, seed=1)
    labels = identities(pairs)
    np.testing.assert_array_equal(labels[:, 0] == labels[:, 1], pairs.same)
    assert pairs.same.sum() == 200
    unique = {frozenset(pair) for pair in zip(pairs.images[::2], pairs.images[1::2], strict=True)}
    assert len(unique) == 400
    assert all(len(pair) == 2 for pair in unique)
    assert 0.3 < pairs.same[:100].mean() < 0.7  # mixed, so that each fold holds both kinds


def test_identities_take_turns_however_many_images_they_have(tmp_path: Path) -> None:
    labels = [0] * 200 + [label for label in range(1, 11) for _ in range(6)]
    pairs = make_pairs(pack(tmp_path / "set", labels), 220, seed=0)
    chosen = identities(pairs)
    assert np.bincount(chosen[pairs.same][:, 0], minlength=11).tolist() == [10] * 11
    assert np.bincount(chosen[~pairs.same].ravel(), minlength=11).max() <= 30


def test_the_choice_follows_the_seed(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "set", list(range(10)) * 5)
    assert make_pairs(dataset, 40, seed=3).images == make_pairs(dataset, 40, seed=3).images
    assert make_pairs(dataset, 40, seed=3).images != make_pairs(dataset, 40, seed=4).images


def test_every_pair_there_is_can_be_asked_for(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "set", [0, 0, 0, 1, 1, 2])  # 4 matching pairs, 11 others
    pairs = make_pairs(dataset, 8, seed=0)
    assert pairs.same.sum() == 4
    assert len({frozenset(pair) for pair in zip(pairs.images[::2], pairs.images[1::2], strict=True)}) == 8
    with pytest.raises(UsageError, match="at most 8"):
        make_pairs(dataset, 10, seed=0)


def test_unless_told_a_small_set_gives_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack_synthetic(tmp_path / "set", identities=4, images_per_identity=3, size=16, workers=1)
    assert main(["pack", "pairs", str(tmp_path / "set"), str(tmp_path / "pairs.bin")]) == 0
    same = np.asarray(read_pairs(tmp_path / "pairs.bin").same)
    assert (len(same), same.sum()) == (24, 12), "4 identities of 3 images make 12 matching pairs"
    told = "24 pairs, 12 of them matching (as many as the set has of both kinds; 6,000 are usual)"
    assert told in capsys.readouterr().out
    more = ["pack", "pairs", str(tmp_path / "set"), str(tmp_path / "more.bin"), "--pairs", "26"]
    assert main(more) == 2
    assert "ask for at most 24" in capsys.readouterr().err


def test_sets_without_possible_pairs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no identity has two images"):
        make_pairs(pack(tmp_path / "singles", [0, 1, 2]), 2, seed=0)
    with pytest.raises(UsageError, match="0 not matching"):
        make_pairs(pack(tmp_path / "one", [0, 0, 0]), 2, seed=0)
    with pytest.raises(UsageError, match="at least 2"):
        make_pairs(pack(tmp_path / "small", [0, 0, 1]), 1, seed=0)


# -- lists


def test_a_list_of_paths(tmp_path: Path) -> None:
    a, b, c = (jpeg(tmp_path / "faces" / name).read_bytes() for name in ("a.jpg", "b.png", "with space.jpg"))
    listed = tmp_path / "mine.txt"
    listed.write_text("a.jpg b.png 1\n\na.jpg\twith space.jpg\t0\n")
    pairs = pairs_from_list(listed, tmp_path / "faces")
    assert pairs.images == [a, b, a, c]
    assert pairs.same.tolist() == [True, False]
    assert pairs.name == "mine"


def test_names_in_a_list_may_be_any(tmp_path: Path) -> None:
    names = [b"a.jpg", "zwei\u2028zeilen.jpg".encode(), "no\u00a0break.jpg".encode(), b"latin\xe9.jpg", "²".encode()]
    images = [jpeg(tmp_path / "a" / f"{place}.png") for place in range(len(names))]
    for name, image in zip(names, images, strict=True):
        (image.parent / os.fsdecode(name)).write_bytes(image.read_bytes())
    lines = [b"%b %b 1\r\n" % (names[0], name) for name in names]
    listed = tmp_path / "mine.txt"
    listed.write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    assert len(pairs_from_list(listed, tmp_path / "a").same) == len(names)
    listed.write_bytes(lines[0] + b"a.jpg \xe9.jpg 0\n")
    with pytest.raises(UsageError, match=r"mine.txt:2: there is no image"):
        pairs_from_list(listed, tmp_path / "a")


def test_the_format_of_lfw(tmp_path: Path) -> None:
    names = ["Ann/Ann_0001.jpg", "Ann/Ann_0012.jpg", "Bo_Li/Bo_Li_0003.png"]
    a1, a12, b3 = (jpeg(tmp_path / name).read_bytes() for name in names)
    listed = tmp_path / "pairs.txt"
    listed.write_text("1\t1\nAnn\t1\t12\nAnn\t12\tBo_Li\t3\n")
    pairs = pairs_from_list(listed, tmp_path)
    assert pairs.images == [a1, a12, a12, b3]
    assert pairs.same.tolist() == [True, False]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.jpg a.jpg", "is no pair"),
        ("a.jpg a.jpg 2", "is no pair"),
        ("a.jpg none.jpg 1", "there is no image"),
        ("a.jpg text.jpg 0", "not an image"),
        ("a.jpg folder 0", "not an image"),
        ("Ann 1 2", "Ann_0001.jpg"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    jpeg(tmp_path / "a.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "folder").mkdir()
    listed = tmp_path / "list.txt"
    listed.write_text(f"a.jpg a.jpg 1\n{line}\n")
    with pytest.raises(UsageError, match=message) as caught:
        pairs_from_list(listed, tmp_path)
    assert "list.txt:2: " in str(caught.value)


def test_empty_and_missing_lists(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("10 300\n\n")
    with pytest.raises(UsageError, match="holds no pair"):
        pairs_from_list(tmp_path / "empty.txt", tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        pairs_from_list(tmp_path / "none.txt", tmp_path)
