"""Packing folders of images, and the writer that all pack verbs share."""

import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfc.data.errors import UsageError
from pfc.data.packing.pack import pack_folder
from pfc.data.packing.writer import ShardedWriter
from pfc.data.records.dataset import RecordDataset
from tests.data.packing.packed import files_of, refusal


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def make_source(root: Path, identities: int = 3, images: int = 4) -> Path:
    for identity in range(identities):
        (root / f"person-{identity}").mkdir(parents=True)
        for i in range(images):
            picture(10 * identity + i).save(root / f"person-{identity}" / f"{i}.jpg")
    return root


def decoded(ds: RecordDataset, index: int) -> Image.Image:
    return Image.open(io.BytesIO(ds.read(index)[1].tobytes()))


def refused(src: Path, out: Path, **options: object) -> str:
    """The one line that packing is refused with; ``out`` is left as it was."""
    before = files_of(out) if out.is_dir() else None
    line = refusal(pack_folder, src, out, **options)
    assert (files_of(out) if out.is_dir() else None) == before
    assert not list(out.parent.glob(".*.partial"))
    return line


def test_folder_to_data_set(tmp_path: Path) -> None:
    src = make_source(tmp_path / "src")
    calls: list[tuple[int, int]] = []
    summary = pack_folder(src, tmp_path / "out", size=16, shards=2, workers=1, progress=lambda *a: calls.append(a))
    assert (summary.images, summary.identities, summary.shards, summary.skipped) == (12, 3, 2, [])
    assert "packed 12 images of 3 identities" in str(summary)
    assert calls[-1] == (12, 12)
    ds = RecordDataset.open(tmp_path / "out")
    assert (len(ds), ds.num_classes, ds.image_size) == (12, 3, (16, 16))
    assert ds.identity_names() == ["person-0", "person-1", "person-2"]
    assert Counter(ds.labels().tolist()) == {0: 4, 1: 4, 2: 4}
    assert {decoded(ds, i).format for i in range(12)} == {"JPEG"}
    assert {decoded(ds, i).size for i in range(12)} == {(16, 16)}
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["source"] == f"folder {src}"
    assert manifest["creation"] == {"size": [16, 16], "quality": 95, "encoding": "jpeg", "shards": 2, "seed": 0}
    assert (tmp_path / "out" / "property").read_text() == "3,16,16\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]


def test_the_order_is_shuffled_by_the_seed_alone(tmp_path: Path) -> None:
    src = make_source(tmp_path / "src", identities=5)
    for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        pack_folder(src, tmp_path / name, size=16, name="same", seed=seed, workers=workers)
    assert list(files_of(tmp_path / "a").values()) == list(files_of(tmp_path / "b").values())
    first = RecordDataset.open(tmp_path / "a").labels().tolist()
    assert first != sorted(first)
    assert first != RecordDataset.open(tmp_path / "c").labels().tolist()


def test_images_are_covered_and_cropped_not_squeezed(tmp_path: Path) -> None:
    (tmp_path / "src" / "a").mkdir(parents=True)
    stripes = np.zeros((30, 90, 3), dtype=np.uint8)
    stripes[:, :30, 0] = stripes[:, 30:60, 1] = stripes[:, 60:, 2] = 255  # red, green, blue
    Image.fromarray(stripes).save(tmp_path / "src" / "a" / "wide.png")
    pack_folder(tmp_path / "src", tmp_path / "out", size=20, encoding="png", workers=1)
    image = np.asarray(decoded(RecordDataset.open(tmp_path / "out"), 0))
    assert image.shape == (20, 20, 3)
    assert image[:, 2:-2, 1].min() > 250
    assert image[:, 2:-2, [0, 2]].max() < 5
    pack_folder(tmp_path / "src", tmp_path / "oblong", size=(10, 30), encoding="png", workers=1)
    image = np.asarray(decoded(RecordDataset.open(tmp_path / "oblong"), 0))
    assert image.shape == (10, 30, 3)
    assert [image[5, x].tolist() for x in (3, 15, 26)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_ready_images_keep_their_bytes(tmp_path: Path) -> None:
    src = make_source(tmp_path / "src", identities=1, images=1) / "person-0"
    picture(1, 40, 30).convert("L").save(src / "gray.jpg")
    kept = {(src / "0.jpg").read_bytes(), (src / "gray.jpg").read_bytes()}
    for options in ({"size": (30, 40)}, {"size": None}):
        out = tmp_path / str(options["size"])
        pack_folder(tmp_path / "src", out, quality=20, workers=1, **options)  # pyright: ignore[reportArgumentType]
        ds = RecordDataset.open(out)
        assert {ds.read(i)[1].tobytes() for i in range(2)} == kept
    pack_folder(tmp_path / "src", tmp_path / "png", size=(30, 40), encoding="png", workers=1)
    ds = RecordDataset.open(tmp_path / "png")
    assert [decoded(ds, i).format for i in range(2)] == ["PNG", "PNG"]


def test_every_kind_of_image_becomes_upright_rgb(tmp_path: Path) -> None:
    src = tmp_path / "src" / "a"
    (src / "deeper").mkdir(parents=True)
    red = Image.new("RGB", (8, 8), (200, 0, 0))
    half = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    half.paste((200, 0, 0, 255), (0, 0, 8, 4))
    sideways = Image.new("RGB", (8, 8), (0, 0, 200))
    sideways.paste((200, 0, 0), (0, 0, 4, 8))  # red on the left; turned by its tag: red on top
    exif = Image.Exif()
    exif[0x0112] = 6
    red.save(src / "1.BMP")
    red.save(src / "deeper" / "2.WebP", lossless=True)
    red.quantize(4).save(src / "3.png")
    half.save(src / "4.png")
    Image.new("L", (8, 8), 77).save(src / "5.pgm")
    Image.fromarray(np.full((8, 8), 77 * 257, dtype=np.uint16)).save(src / "6.png")
    red.convert("CMYK").save(src / "7.jpeg", quality=95)
    sideways.save(src / "8.jpg", exif=exif, quality=95, subsampling=0)
    summary = pack_folder(tmp_path / "src", tmp_path / "out", size=8, encoding="png", workers=1)
    assert (summary.images, summary.skipped) == (8, [])
    ds = RecordDataset.open(tmp_path / "out")
    assert {decoded(ds, i).mode for i in range(8)} == {"RGB"}
    seen = Counter(levels(decoded(ds, i)) for i in range(8))
    assert seen == {
        ("red", "red"): 4,
        ("gray", "gray"): 2,
        ("red", "white"): 1,  # the transparent half
        ("red", "blue"): 1,  # the one that lay on its side
    }


def test_gray_of_no_known_range_is_left_out(tmp_path: Path) -> None:
    src = tmp_path / "src" / "a"
    src.mkdir(parents=True)
    Image.new("L", (8, 8), 77).save(src / "fine.png")
    Image.fromarray(np.full((8, 8), 77 * 257, dtype=np.int32)).save(src / "16.tif")
    Image.fromarray(np.full((8, 8), 1 << 30, dtype=np.int32)).save(src / "32.tif")
    Image.fromarray(np.full((8, 8), -5, dtype=np.int32)).save(src / "signed.tif")
    Image.fromarray(np.full((8, 8), 0.3, dtype=np.float32)).save(src / "float.tif")
    for path in src.glob("*.tif"):
        path.rename(path.with_suffix(".bmp"))  # named like an image that is packed
    summary = pack_folder(tmp_path / "src", tmp_path / "out", size=8, encoding="png", workers=1)
    assert summary.skipped == [
        ("a/32.bmp", "its gray has 32 bits and no known range: convert it to 8 or 16 bits"),
        ("a/float.bmp", "its gray is in floating-point numbers of no known range: convert it to 8 or 16 bits"),
        ("a/signed.bmp", "its gray has 32 bits and no known range: convert it to 8 or 16 bits"),
    ]
    ds = RecordDataset.open(tmp_path / "out")
    assert [levels(decoded(ds, i)) for i in range(len(ds))] == [("gray", "gray")] * 2


def levels(image: Image.Image) -> tuple[str, str]:
    """The colours near the top and near the bottom."""
    names = {(200, 0, 0): "red", (77, 77, 77): "gray", (255, 255, 255): "white", (0, 0, 200): "blue"}
    pixels = np.asarray(image).astype(int)

    def nearest(pixel: np.ndarray) -> str:
        colour = min(names, key=lambda name: np.abs(pixel - name).sum())
        assert np.abs(pixel - colour).max() < 12
        return names[colour]

    return nearest(pixels[1, 4]), nearest(pixels[6, 4])


def test_a_ready_image_that_lies_on_its_side_is_turned(tmp_path: Path) -> None:
    (tmp_path / "src" / "a").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = Image.new("RGB", (8, 8), (0, 0, 200))
    sideways.paste((200, 0, 0), (0, 0, 4, 8))
    sideways.save(tmp_path / "src" / "a" / "1.jpg", exif=exif, quality=95, subsampling=0)
    pack_folder(tmp_path / "src", tmp_path / "out", size=8, workers=1)
    top, bottom = np.asarray(decoded(RecordDataset.open(tmp_path / "out"), 0)).astype(int)[[1, 6], 4]
    assert top[0] > top[2] + 100
    assert bottom[2] > bottom[0] + 100


@pytest.mark.parametrize("size", [16, (30, 40)])
def test_unreadable_images_are_counted_named_and_skipped(size: int | tuple[int, int], tmp_path: Path) -> None:
    src = make_source(tmp_path / "src")
    (src / "person-1" / "broken.jpg").write_bytes(b"no picture")
    whole = (src / "person-1" / "0.jpg").read_bytes()
    (src / "person-1" / "cut.jpg").write_bytes(whole[:-60])
    (src / "person-1" / "empty.png").touch()
    (src / "person-2" / "notes.txt").write_text("x")
    summary = pack_folder(src, tmp_path / "out", size=size, workers=2)
    assert (summary.images, summary.ignored_files) == (12, 1)
    assert [file for file, _ in summary.skipped] == [
        f"person-1/{name}" for name in ("broken.jpg", "cut.jpg", "empty.png")
    ]
    assert "skipped 3 unreadable" in str(summary)
    assert "person-1/cut.jpg: " in str(summary)
    assert summary.skipped[0][1] == "no image format starts like this"
    listed = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [file for file, _ in summary.skipped]
    assert len(RecordDataset.open(tmp_path / "out")) == 12


def test_identity_whose_images_are_all_unreadable_is_named(tmp_path: Path) -> None:
    src = make_source(tmp_path / "src")
    for file in (src / "person-1").iterdir():
        file.write_bytes(b"no picture")
    summary = pack_folder(src, tmp_path / "out", size=16, workers=1)
    assert (summary.images, summary.identities, summary.empty_identities) == (8, 3, ["person-1"])
    assert "person-1" in str(summary).splitlines()[-1]
    for file in src.glob("*/*.jpg"):
        file.write_bytes(b"no picture")
    assert "none of its 12 images can be read" in refused(src, tmp_path / "out2")


def test_wrong_sources(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no such folder" in refused(tmp_path / "none", out)
    (tmp_path / "src").mkdir()
    assert "has no sub-folders" in refused(tmp_path / "src", out)
    picture(0).save(tmp_path / "src" / "a.jpg")
    assert "has no sub-folders" in refused(tmp_path / "src", out)
    assert "is a file" in refused(tmp_path / "src" / "a.jpg", out)
    src = make_source(tmp_path / "people")
    (src / "nobody").mkdir()
    (src / "nobody" / "a.tiff").touch()
    line = refused(src, out)
    assert "no image in the sub-folder(s) nobody: add images (bmp, jpeg, jpg, pgm, png, webp)" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "at least 1 pixel"),
        ({"quality": 0}, "from 1 to 100"),
        ({"encoding": "gif"}, "one of jpeg, png"),
        ({"shards": 0}, "at least 1"),
        ({"shards": 13}, "13 shards for 12 images: ask for 12"),
    ],
)
def test_impossible_options(options: dict[str, object], message: str, tmp_path: Path) -> None:
    assert message in refused(make_source(tmp_path / "src"), tmp_path / "out", **options)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    src, out = make_source(tmp_path / "src"), tmp_path / "out"
    out.mkdir()
    pack_folder(src, out, size=16, workers=1)  # an empty directory will do
    assert "not empty: give another directory" in refused(src, out)
    pack_folder(src, out, size=8, workers=1, overwrite=True)
    assert RecordDataset.open(out).image_size == (8, 8)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert "no packed data set" in refused(src, mine, overwrite=True)
    assert "is a file" in refused(src, mine / "thesis.txt", overwrite=True)


def test_output_and_source_must_lie_apart(tmp_path: Path) -> None:
    src = make_source(tmp_path / "src")
    assert "give a place outside" in refused(src, src / "packed")
    (tmp_path / "dataset.json").touch()
    assert "give a place outside" in refused(src, tmp_path, overwrite=True)
    assert len(list(src.glob("*/*.jpg"))) == 12


def test_writer_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    with (
        pytest.raises(TypeError),
        ShardedWriter(tmp_path / "out", identities=2, image_size=None, source="test") as writer,
    ):
        writer.write(0, "no bytes")  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())
    with ShardedWriter(tmp_path / "old", identities=2, image_size=None, source="test") as writer:
        writer.write(0, b"x")
    before = files_of(tmp_path / "old")
    with (
        pytest.raises(UsageError, match="label 2 is not in 0 … 1"),
        ShardedWriter(tmp_path / "old", identities=2, image_size=None, source="test", overwrite=True) as writer,
    ):
        writer.write(2, b"x")
    assert files_of(tmp_path / "old") == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(("label", "image", "message"), [(1.5, b"x", "label 1.5 is not in"), (0, b"", "is empty")])
def test_writer_refuses_what_no_reader_takes(label: float, image: bytes, message: str, tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=message),
        ShardedWriter(tmp_path / "out", identities=3, image_size=None, source="test") as writer,
    ):
        writer.write(label, image)  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def test_writer_spreads_images_evenly_and_numbers_them(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path / "out", identities=1, image_size=None, source="test", shards=3) as writer:
        for _ in range(7):
            writer.write(0, b"x")
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert [shard["images"] for shard in manifest["shards"]] == [3, 2, 2]
    keys = [line.split("\t")[0] for line in (tmp_path / "out" / "train-00001.idx").read_text().splitlines()]
    assert keys == ["1", "4"]


def test_a_name_that_is_no_utf8_is_no_obstacle(tmp_path: Path) -> None:
    """A folder name of any bytes packs, prints and reads back."""
    src = make_source(tmp_path / os.fsdecode(b"src\xeb"), identities=1)
    odd = os.fsdecode(b"zo\xeb")
    (src / odd).mkdir()
    (src / "person-0" / "0.jpg").rename(src / odd / "0.jpg")
    (src / odd / "broken.jpg").touch()
    out = tmp_path / os.fsdecode(b"out\xeb")
    summary = pack_folder(src, out, size=8, workers=1)
    assert "zo\\udceb/broken.jpg" in str(summary).encode().decode()
    ds = RecordDataset.open(out)
    assert ds.identity_names() == ["person-0", odd]
    assert ds.name == "out\\udceb"
