"""Five-point alignment: faces land on the template, the same in packing and in evaluation."""

import builtins
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import map_coordinates

from pfc.data import RecordDataset, pack_table
from pfc.data.alignment import LANDMARK_COLUMNS, TEMPLATE, align, template_for
from pfc.data.errors import UsageError
from pfc.data.images import reencode
from pfc.data.protocols.images import open_images
from pfc.data.protocols.table import read_protocol
from pfc.data.records.recordio import RecordWriter
from tests.data.packing.packed import files_of, killed_at, refusal
from tests.data.pictures import encode

TURN, SCALE, SHIFT = 0.4, 1.7, np.array([30.0, 20.0])
SPAN = 260  # pixels of the photograph that holds the face


def waves(points):
    """A picture that is known everywhere: [..., 2] (x, y) → [..., 3], 0 … 255."""
    x, y = points[..., 0], points[..., 1]
    channels = (x * 0.5 + y * 0.2, y * 0.45 - x * 0.1, x * 0.3 - y * 0.4)
    return np.stack([127.5 + 120 * np.sin(phase) for phase in channels], axis=-1)


def moved(points):
    """From the face of 112 × 112 into the photograph."""
    turn = np.array([[np.cos(TURN), -np.sin(TURN)], [np.sin(TURN), np.cos(TURN)]])
    return SCALE * points @ turn.T + [90.0, 10.0] + SHIFT


def moved_back(points):
    turn = np.array([[np.cos(TURN), -np.sin(TURN)], [np.sin(TURN), np.cos(TURN)]])
    return (points - SHIFT - [90.0, 10.0]) @ turn / SCALE


def pixels(height, width):
    """(x, y) of every pixel, [height, width, 2]."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(float)


def photograph():
    return Image.fromarray(waves(moved_back(pixels(SPAN, SPAN))).round().astype(np.uint8))


LANDMARKS = moved(TEMPLATE).astype(np.float32)


def dots(places):
    """A photograph that is black but for a spot at each place (x, y)."""
    grid = pixels(SPAN, SPAN)
    spots = sum(np.exp(-((grid - place) ** 2).sum(axis=-1) / 18) for place in places)
    return Image.fromarray((255 * np.minimum(spots, 1)).round().astype(np.uint8)).convert("RGB")


def centre_near(image, place, radius=7):
    """Centre of mass of the light around a place."""
    light = np.asarray(image)[..., 0].astype(float)
    grid = pixels(*light.shape)
    light = light * (((grid - place) ** 2).sum(axis=-1) < radius**2)
    return (grid * light[..., None]).sum(axis=(0, 1)) / light.sum()


def test_a_moved_picture_comes_back():
    aligned = np.asarray(align(photograph(), LANDMARKS, (112, 112))).astype(float)
    truth = waves(pixels(112, 112))
    inside = (slice(12, 100), slice(12, 100))
    error = np.abs(aligned - truth)[inside].mean()
    half_a_pixel = np.abs(waves(pixels(112, 112) + 0.25) - truth)[inside].mean()
    assert error < 4 < half_a_pixel  # bilinear interpolation takes a little off the waves' tops


def test_it_is_the_bilinear_warp():
    """Against scipy's interpolation, in 128 × 128 pixels."""
    image = photograph()
    aligned = np.asarray(align(image, LANDMARKS, (128, 128))).astype(float)
    places = moved(pixels(128, 128) * 112 / 128)
    source = np.asarray(image).astype(float)
    expected = np.stack(
        [map_coordinates(source[..., c], places[..., ::-1].transpose(2, 0, 1), order=1) for c in range(3)], axis=-1
    )
    inside = ((places > 1) & (places < SPAN - 2)).all(axis=-1)
    assert inside.mean() > 0.9
    assert np.abs(aligned - expected)[inside].max() < 2


@pytest.mark.parametrize("size", [(112, 112), (224, 224), (112, 96)])
def test_landmarks_land_on_the_template(size):
    aligned = align(dots(LANDMARKS), LANDMARKS, size)
    assert aligned.size == (size[1], size[0])
    for place in template_for(size):
        assert centre_near(aligned, place) == pytest.approx(place, abs=0.1)


def test_the_template_of_other_sizes():
    assert template_for((224, 224)) == pytest.approx(2 * TEMPLATE)
    assert template_for((112, 96)) == pytest.approx(TEMPLATE - (8, 0))


def test_a_mirrored_face_stays_mirrored():
    """Landmarks of which the left ones are on the right: only a reflection would bring them to the template."""

    def side(points):
        """Of which side of the eyes' line, seen from the first, the nose lies."""
        (ax, ay), (bx, by) = points[1] - points[0], points[2] - points[0]
        return np.sign(ax * by - ay * bx)

    mirrored = (LANDMARKS * (-1, 1) + (SPAN - 1, 0)).astype(np.float32)
    places = []
    for place in mirrored:
        light = np.asarray(align(dots([place]), mirrored, (112, 112)))[..., 0].astype(float)
        places.append((pixels(112, 112) * light[..., None]).sum(axis=(0, 1)) / light.sum())
    assert side(np.array(places)) == side(mirrored) == -side(TEMPLATE)


def test_landmarks_are_those_of_the_upright_image():
    lying = Image.Exif()
    lying[0x0112] = 6  # to be turned clockwise to stand
    file = io.BytesIO()
    upright = photograph().crop((0, 0, SPAN, SPAN - 40))
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=lying)
    stored = reencode(file.getvalue(), size=(112, 112), quality=95, encoding="png", landmarks=LANDMARKS)
    assert (np.asarray(Image.open(io.BytesIO(stored))) == np.asarray(align(upright, LANDMARKS, (112, 112)))).all()


@pytest.mark.parametrize(("side", "kind"), [(1040, "JPEG"), (112, "JPEG"), (112, "PNG")])
def test_landmarks_count_the_files_own_pixels(side: int, kind: Any) -> None:
    """Of a large JPEG too, which is decoded at a part of its size elsewhere; and an image of the size is warped too."""
    file = io.BytesIO()
    photograph().resize((side, side)).save(file, kind)
    landmarks = (LANDMARKS * side / SPAN).astype(np.float32)
    stored = reencode(file.getvalue(), size=(112, 112), quality=95, encoding="png", landmarks=landmarks)
    expected = align(Image.open(file).convert("RGB"), landmarks, (112, 112))
    assert (np.asarray(Image.open(io.BytesIO(stored))) == np.asarray(expected)).all()
    as_jpeg = reencode(file.getvalue(), size=(112, 112), quality=95, encoding="jpeg", landmarks=landmarks)
    assert Image.open(io.BytesIO(as_jpeg)).size == (112, 112)
    assert as_jpeg != file.getvalue()


# In tables

HEADER = ",".join(LANDMARK_COLUMNS)


def write_faces(folder: Path, number: int = 12) -> Path:
    """A table of faces; the second has no landmarks, those of the third are one point, the fourth cannot be read."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(number):
        spread = 0 if i == 2 else 1
        (folder / f"{i}.png").write_bytes(b"no picture" if i == 3 else encode(np.asarray(photograph())))
        points = ",".join(f"{x:.3f}" for x in (LANDMARKS[0] + spread * (LANDMARKS - LANDMARKS[0]) + i).ravel())
        lines.append(f"{i}.png,p{i % 2},{',' * 9 if i == 1 else points}\n")
    table = folder / "faces.csv"
    table.write_text(f"image,identity,{HEADER}\n" + "".join(lines))
    return table


OPTIONS: dict[str, Any] = {"label_column": "identity", "align": True, "encoding": "png", "workers": 1}


def test_packing_and_evaluation_align_alike(tmp_path: Path) -> None:
    table = write_faces(tmp_path / "in")
    summary = pack_table(table, tmp_path / "out", shuffle=False, **OPTIONS)
    assert summary.skipped == [
        ("1.png", "it has no landmarks"),
        ("2.png", "its landmarks are one point"),
        ("3.png", "no image format starts like this"),
    ]
    assert (tmp_path / "out" / "skipped.tsv").read_text().count("\n") == 3
    dataset = RecordDataset.open(tmp_path / "out")
    assert dataset.manifest is not None
    assert dataset.manifest.creation["align"] is True
    assert dataset.image_size == (112, 112)
    protocol = read_protocol(table)
    assert protocol.landmarks is not None
    assert protocol.landmarks.shape == (12, 5, 2)
    images = open_images(protocol.images, protocol.folder, protocol.landmarks, (112, 112))
    for number, row in enumerate([0, *range(4, 12)]):
        stored = dataset.read(number)[1].tobytes()
        assert stored == images[row]
        expected = align(photograph(), LANDMARKS + np.float32(row), (112, 112))
        assert np.abs(np.asarray(Image.open(io.BytesIO(stored))).astype(int) - np.asarray(expected)).max() <= 1
    assert images[1] == (tmp_path / "in" / "1.png").read_bytes()  # without landmarks it is taken as it is
    for row, problem in ((2, "2.png cannot be aligned: its landmarks are one point"), (3, "3.png cannot be aligned")):
        with pytest.raises(UsageError, match=problem):
            images[row]
    as_they_are = open_images(protocol.images, protocol.folder)
    assert as_they_are[0] == (tmp_path / "in" / "0.png").read_bytes()


def test_alignment_takes_part_in_what_is_resumed(tmp_path: Path) -> None:
    table = write_faces(tmp_path / "in", 30)
    whole, out = tmp_path / "whole" / "faces", tmp_path / "stopped" / "faces"
    pack_table(table, whole, **OPTIONS)
    assert killed_at(10, RecordWriter, "write", pack_table, table, out, **OPTIONS)
    assert "with other options" in refusal(pack_table, table, out, **OPTIONS | {"align": False})
    text = table.read_text()
    last = text.rstrip("\n").rpartition(",")[2]
    table.write_text(text.replace(last, "1.5"))
    assert "with other options" in refusal(pack_table, table, out, **OPTIONS)
    table.write_text(text)
    assert pack_table(table, out, **OPTIONS).resumed_at > 0
    assert files_of(out) == files_of(whole)


def test_faces_in_a_column_of_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {name: [float(x), float("nan")] for name, x in zip(LANDMARK_COLUMNS, LANDMARKS.ravel(), strict=True)}
    image = encode(np.asarray(photograph()))
    parquet.write_table(arrow.table({"image": [image] * 2, "label": [0, 1], **columns}), tmp_path / "t.parquet")
    summary = pack_table(tmp_path / "t.parquet", tmp_path / "out", align=True, encoding="png", size=64, workers=1)
    assert summary.skipped == [(f"{tmp_path / 't.parquet'}: row 1", "it has no landmarks")]
    stored = Image.open(io.BytesIO(RecordDataset.open(tmp_path / "out").read(0)[1].tobytes()))
    assert (np.asarray(stored) == np.asarray(align(photograph(), LANDMARKS, (64, 64)))).all()


@pytest.mark.parametrize(
    ("header", "row", "options", "message"),
    [
        ("x1,y1", "1,2", {}, "has landmarks, but no column x2: five points are x1, y1, ..., x5, y5"),
        ("age", "7", {}, "has no columns x1, y1, ..., x5, y5: to align faces, find their five points first"),
        (HEADER, "1,2,3,4,,6,7,8,9,10", {}, "line 2 has no x3: give all ten numbers of its landmarks, or none"),
        (HEADER, "1,2,3,4,5,6,7,8,far,10", {}, "line 2: x5 far is no number"),
        (HEADER, "1,2,3,4,5,6,7,8,inf,10", {}, "line 2: x5 inf is no number"),
        (HEADER, ",,,,,,,,,", {}, "no row has landmarks"),
        (HEADER, ",,,,,,,,,", {"size": None}, "aligned faces have one size"),
        (HEADER, ",,,,,,,,,", {"keep_bytes": True}, "aligned faces have one size"),
    ],
)
def test_wrong_landmarks(header: str, row: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"path,label,{header}\na.jpg,1,{row}\n")
    assert message in refusal(pack_table, tmp_path / "t.csv", tmp_path / "out", align=True, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_without_scikit_image_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_faces(tmp_path / "in", 1)
    real = builtins.__import__

    def no_skimage(name: str, *rest: Any) -> Any:
        if name.startswith("skimage"):
            raise ImportError(name)
        return real(name, *rest)

    protocol = read_protocol(table)
    monkeypatch.setattr(builtins, "__import__", no_skimage)
    assert refusal(pack_table, table, tmp_path / "out", **OPTIONS).endswith("pip install 'pfc[align]'")
    with pytest.raises(UsageError, match=r"pip install 'pfc\[align\]'"):
        open_images(protocol.images, protocol.folder, protocol.landmarks, (112, 112))
    assert pack_table(table, tmp_path / "out", **OPTIONS | {"align": False}).images == 1
