"""What DALI must not be given is found out by its header; everything else it decodes or refuses in an orderly way."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfc.data import inspect_dataset, pack_folder, pack_recordio
from pfc.data.loading.decoding import decode_images
from pfc.data.loading.headers import header_problem, header_size, pillow_problem
from pfc.data.loading.loader import TrainLoader
from pfc.data.loading.plain import PlainRecords
from pfc.data.records.dataset import RecordDataset
from tests.data.pictures import SIZE, pack, picture
from tests.ranks import run_ranks


def encode(number: int, form: str, **options: object) -> np.ndarray:
    file = io.BytesIO()
    smooth = Image.fromarray(picture(number, (4, 4))).resize(SIZE[::-1], Image.Resampling.BICUBIC)
    smooth.save(file, form, **options)
    return np.frombuffer(file.getvalue(), dtype=np.uint8)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "quality": 30}),
        ("JPEG", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0", "comment": b"a comment"}),
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("PPM", {}),
    ],
)
def test_good_images_pass_and_are_decoded(form: str, options: dict) -> None:
    image = encode(0, form, **options)
    assert header_problem(image) is None
    (decoded,) = decode_images([image], image_size=SIZE, batch_size=1)
    assert decoded.shape == (1, 3, *SIZE)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_every_cut_through_the_header_is_found(form: str) -> None:
    image = encode(0, form)
    whole = image.tobytes()
    pixels = whole.index(b"\xff\xda") if form == "JPEG" else len(whole) - 12
    for end in range(pixels):
        assert header_problem(image[:end]), end
    for place in (0, 1, 2, 5):
        broken = image.copy()
        broken[place] ^= 0x40
        assert header_problem(broken) or (form == "JPEG" and place == 5)


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claiming(image: np.ndarray, height: int, width: int) -> bytes:
    """The PNG or JPEG with another size in its header."""
    data = image.tobytes()
    if data[:1] == b"\x89":
        return data[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29]) + data[33:]
    size = data.index(b"\xff\xc0") + 5
    return data[:size] + struct.pack(">HH", height, width) + data[size + 4 :]


STUBS = {
    "a zero": b"\0",
    "text": b"no image at all",
    "zeros": bytes(100),
    "PNG: signature": b"\x89PNG\r\n\x1a\n",
    "PNG: signature, end": b"\x89PNG\r\n\x1a\n" + chunk(b"IEND"),
    "PNG: pixels, end": b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT") + chunk(b"IEND"),
    "PNG: short header": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(12)) + chunk(b"IEND"),
    "PNG: 0 x 0": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(8) + b"\x08\2\0\0\0") + chunk(b"IEND"),
    "JPEG: start": b"\xff\xd8\xff",
    "JPEG: start, end": b"\xff\xd8\xff\xd9",
    "JPEG: short segment": b"\xff\xd8\xff\xe0\0\x01",
    "JPEG: scan": b"\xff\xd8\xff\xda\0\x08\1\1\0\0\x3f\0\xff\xd9",
    "GIF": b"GIF89a\1\0\1\0\0\0\0;",
    "WebP": b"RIFF\4\0\0\0WEBP",
    "WebP: chunk": b"RIFF\x0c\0\0\0WEBPVP8 \0\0\0\0",
    "BMP": b"BM",
    "BMP: zeros": b"BM" + bytes(52),
    "PPM": b"P6 1 1 255\n",
    "TIFF": b"II*\0\x08\0\0\0\0\0\0\0\0\0",
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "PNG: 60000 x 60000": claiming(encode(0, "PNG"), 60_000, 60_000),
    "JPEG: 60000 x 60000": claiming(encode(0, "JPEG"), 60_000, 60_000),
}


@pytest.mark.parametrize("image", [b"", *STUBS.values()], ids=["nothing", *STUBS])
def test_what_is_no_image_is_found(image: bytes) -> None:
    assert header_problem(np.frombuffer(image, dtype=np.uint8))


@pytest.mark.parametrize("compiled", ["0", "1"])
def test_stubs_are_damage_to_packing_inspection_and_loading(
    compiled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PFC_COMPILED", compiled)
    images = [encode(number, "PNG").tobytes() for number in range(20)] + list(STUBS.values())
    for label, image in enumerate(images):
        (tmp_path / "in" / f"{label:02}").mkdir(parents=True)
        (tmp_path / "in" / f"{label:02}" / "1.png").write_bytes(image)
    stubs = {f"{label:02}/1.png" for label in range(20, len(images))}
    for number, options in enumerate(({"size": SIZE}, {"size": None}, {"keep_bytes": True})):
        summary = pack_folder(tmp_path / "in", tmp_path / str(number), workers=1, **options)
        assert (summary.images, {name for name, _ in summary.skipped}) == (20, stubs)
    pack(tmp_path / "all", images, identities=len(images))
    for decode in (False, True):
        report = inspect_dataset(tmp_path / "all", decode=decode, workers=1)
        assert (report.images, report.damaged) == (20, len(STUBS))
        assert all("its image cannot be decoded: " in error.what for error in report.errors)
    checked = pack_recordio(tmp_path / "all", tmp_path / "checked", workers=1, check=True)
    assert (checked.images, len(checked.skipped)) == (20, len(STUBS))
    ((labels, damaged),) = run_ranks(1, load_all, tmp_path / "all")
    assert (set(labels), damaged) == (set(range(20)), len(STUBS))


def test_the_compiled_pass_judges_headers_alike(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    good = [encode(number, form) for number in range(20) for form in ("JPEG", "PNG")]
    good += [encode(number, "JPEG", progressive=True, comment=b"a comment") for number in range(20)]
    images = [*good, *(corrupted(random, image) for image in good * 20)]
    images += [rearranged(random, image) for image in good * 5]
    jpeg, png = good[0].tobytes(), good[1].tobytes()
    frame = jpeg.index(b"\xff\xc0")
    odd = [jpeg[:frame] + b"\xff\xff\xff" + jpeg[frame:]]  # fill bytes
    odd += [jpeg[: frame + 9] + bytes([components]) + jpeg[frame + 10 :] for components in (0, 2, 4, 5)]
    odd += [claiming(image, *size) for image in good[:2] for size in ((8192, 16384), (16384, 8193), (60_000, 60_000))]
    odd += [claiming(good[1], *size) for size in ((1, 1 << 27), ((1 << 27) + 1, 1), (1 << 31, 1 << 31))]
    odd += [png[:33] + chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0") + png[33:]]
    odd += [png[:8] + (14).to_bytes(4, "big") + png[12:], png[:24] + b"\3" + png[25:]]
    images += [np.frombuffer(image, dtype=np.uint8) for image in odd]
    dataset = pack(tmp_path, [image.tobytes() for image in images], identities=len(images))
    found = PlainRecords(dataset).find(np.arange(len(images)))
    judged = [header_problem(dataset.read(index)[1]) is None for index in range(len(images))]
    assert (found.labels >= 0).tolist() == judged
    for index in np.flatnonzero(judged).tolist():
        size = header_size(dataset.read(index)[1])
        assert size is None or PlainRecords(dataset).find(np.array([index])).have_size(size)
    assert len(good) < sum(judged) < len(images)


def test_what_dali_does_not_decode_is_found() -> None:
    assert header_problem(encode(0, "GIF")) == "DALI does not decode GIF"
    assert pillow_problem(encode(0, "BMP")) is None
    with pytest.raises(RuntimeError, match="image 2 cannot be decoded: DALI does not decode GIF"):
        list(decode_images([encode(0, "PNG"), encode(1, "JPEG"), encode(2, "GIF")], image_size=SIZE, batch_size=3))


def gray(maximum: int, form: str = "P5") -> bytes:
    return f"{form} {SIZE[1]} {SIZE[0]}\n# at most\n{maximum}\n".encode() + bytes(2 * SIZE[0] * SIZE[1])


def test_inspection_and_training_agree_about_what_is_fit(tmp_path: Path) -> None:
    smooth = Image.fromarray(picture(0, (4, 4))).resize(SIZE[::-1])
    exif = Image.Exif()
    exif[0x0112] = 3
    # A chunk of odd length is followed by a zero, where DALI looks for the EXIF data.
    lossless = [encoded(Image.fromarray(picture(i)), "WEBP", lossless=True, exif=exif) for i in range(12)]
    odd, even = ([image for image in lossless if image[34] % 2 == which] for which in (1, 0))
    fit = [encoded(smooth, "WEBP", exif=exif), even[0], gray(255), gray(65535), encoded(smooth, "TIFF")]
    unfit = [odd[0], gray(100), gray(4095), gray(31, "P6") + bytes(SIZE[0] * SIZE[1])]
    unfit += [encoded(smooth.convert(mode), "TIFF") for mode in ("F", "I", "1", "LA")]
    unfit += [encoded(smooth.convert("LA"), "JPEG2000"), encoded(smooth.convert("F"), "PPM")]
    dataset = pack(tmp_path / "set", [*fit, *unfit], identities=len(fit + unfit))
    named = {error.key for error in inspect_dataset(tmp_path / "set", workers=1).errors}
    bad = {i for i in range(len(dataset)) if dataset.locate(i)[0].keys[dataset.locate(i)[1]] in named}
    assert {dataset.label(i) for i in bad} == set(range(len(fit), len(fit + unfit)))
    loader = TrainLoader(dataset, batch_size=len(dataset), image_size=SIZE, max_damaged=1.0)
    next(loader)
    assert loader.take_damage()[1].keys() == bad
    loader.close()


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def corrupted(random: np.random.Generator, image: np.ndarray) -> np.ndarray:
    image = image.copy()
    at = int(random.integers(0, min(len(image) - 1, random.choice([30, 700, 10_000]))))
    match random.integers(4):
        case 0:
            image[at] ^= 1 << int(random.integers(8))
        case 1:
            image[at : at + random.integers(1, 60)] = random.integers(256)
        case 2:
            image = image[: at + 1]
        case 3:
            end = min(len(image), at + int(random.integers(1, 200)))
            image[at:end] = random.integers(0, 256, end - at)
    return image


def rearranged(random: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The chunks or segments of an image, some left out, doubled or moved."""
    data = image.tobytes()
    is_png = data[:1] == b"\x89"
    pieces, at = [], 8 if is_png else 2
    while at < len(data):
        length = 12 + int.from_bytes(data[at : at + 4]) if is_png else 2 + int.from_bytes(data[at + 2 : at + 4])
        if not is_png and data[at + 1] == 0xDA:
            length = len(data)
        pieces.append(data[at : at + length])
        at += length
    chosen = random.choice(len(pieces), int(random.integers(0, len(pieces) + 2)))
    if random.integers(2):
        chosen = np.unique(chosen)
    return np.frombuffer(data[: 8 if is_png else 2] + b"".join(pieces[i] for i in chosen), dtype=np.uint8)


def load_all(folder: Path) -> tuple[list[int], int]:
    """On a process of its own: the labels of an epoch, and how many samples were damaged."""
    dataset = RecordDataset.open(folder)
    loader = TrainLoader(dataset, batch_size=10, image_size=SIZE, max_damaged=1.0)
    labels = [label for _ in range(-(-len(dataset) // 10)) for label in next(loader).labels.tolist()]
    _, met = loader.take_damage()
    loader.close()
    return labels, len(met)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_random_damage_ends_no_process(form: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = [encode(number, form) for number in range(300)]
    bad = set(random.choice(300, 100, replace=False).tolist())
    given = [corrupted(random, image) if number in bad else image for number, image in enumerate(images)]
    pack(tmp_path / "set", [image.tobytes() for image in given], identities=300)
    ((labels, damaged),) = run_ranks(1, load_all, tmp_path / "set")
    assert 40 < damaged <= 100
    assert set(range(300)) - bad <= set(labels), "every good one is seen"
    assert len(set(labels)) == 300 - damaged
