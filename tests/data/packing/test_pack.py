"""Packing folders of images, and the writer that all pack verbs share."""

import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfc.data.errors import UsageError
from pfc.data.packing.pack import pack_folder
from pfc.data.packing.writer import ShardedWriter
from pfc.data.records.dataset import RecordDataset
from pfc.data.workers import parallel_map


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


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(src: Path, out: Path, **options: object) -> str:
    """The one line that packing is refused with; ``out`` is left as it was."""
    before = files_of(out) if out.is_dir() else None
    with pytest.raises(UsageError) as caught:
        pack_folder(src, out, workers=1, **options)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)
    assert (files_of(out) if out.is_dir() else None) == before
    assert not list(out.parent.glob(".*.partial"))
    return str(caught.value)


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


def square_unless_three(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number * number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("processes", [1, 2])
def test_parallel_map_keeps_order_and_raises_what_a_worker_raises(processes: int) -> None:
    assert list(parallel_map(square_unless_three, range(4, 40), workers=processes, chunk=2)) == [
        number * number for number in range(4, 40)
    ]
    with pytest.raises(ValueError, match="three"):
        list(parallel_map(square_unless_three, range(10), workers=processes, chunk=2))


def test_parallel_map_survives_a_killed_worker() -> None:
    with pytest.raises(RuntimeError, match="worker process died"):
        list(parallel_map(die_at_three, range(10), workers=2, chunk=1))


def made(task: tuple[int, int], calls: Path) -> bytes:
    """A result of so many bytes, which leaves a trace."""
    number, size = task
    (calls / str(number)).touch()
    return bytes(size)


def test_parallel_map_keeps_few_bytes_however_large_the_results_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfc.data.workers.IN_FLIGHT", 6 << 20)
    sizes = [10] * 300 + [1 << 20] * 60 + [10] * 300
    results = parallel_map(partial(made, calls=tmp_path), enumerate(sizes), workers=2)
    for taken, (result, size) in enumerate(zip(results, sizes, strict=True), start=1):
        assert len(result) == size
        if size > 10:
            ready = sum(sizes[number] for number in map(int, os.listdir(tmp_path)) if number >= taken)
            # Six chunks in flight, one of them taken apart here, and each may have one result too many.
            assert ready <= (6 + 7) << 20
    assert len(os.listdir(tmp_path)) == len(sizes)


@pytest.mark.parametrize(
    "call",
    [
        "pack_folder({src!r}, {out!r}, size=16, workers=2)",
        "pack_recordio({old!r}, {out!r}, workers=2)",
        "pack_synthetic({out!r}, identities=2, images_per_identity=2, workers=2)",
        "pack_glyphs({out!r}, identities=4, heldout_identities=4, heldout_pairs=4, images_per_identity=4, workers=2)",
    ],
)
def test_a_script_without_a_guard_is_told_of_it(call: str, tmp_path: Path) -> None:
    src = make_source(tmp_path / "src")
    pack_folder(src, tmp_path / "old", size=16, workers=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    script = tmp_path / "script.py"
    text = "from pfc.data import pack_folder, pack_glyphs, pack_recordio, pack_synthetic\n" + call.format(
        src=str(src), old=str(tmp_path / "old"), out=str(tmp_path / "out")
    )
    script.write_text(text)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.count("Traceback") == 1  # this script's own
    last = run.stderr.splitlines()[-1]
    assert last.startswith("pfc.data.errors.UsageError: ")
    assert 'if __name__ == "__main__":' in last
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "script.py"])
    first, second = text.splitlines()
    script.write_text(f'{first}\nif __name__ == "__main__":\n    {second}\n')
    subprocess.run([sys.executable, script], check=True)
    assert (tmp_path / "out").is_dir()


def test_a_script_without_a_guard_loses_no_interrupted_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_source(tmp_path / "src")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pfc.data.packing.run.SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        pack_folder(src, tmp_path / "out", size=16, workers=1, progress=interrupt)
    left = files_of(tmp_path / ".out.partial")
    assert left
    script = tmp_path / "script.py"
    script.write_text(
        f"from pfc.data import pack_folder\npack_folder({str(src)!r}, {str(tmp_path / 'out')!r}, size=16)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert "__main__" in run.stderr.splitlines()[-1]
    assert files_of(tmp_path / ".out.partial").keys() >= left.keys()
    assert pack_folder(src, tmp_path / "out", size=16, workers=1).resumed_at > 0


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
