"""Glyphs: held-out characters and fonts stay out of training, and the same arguments give the same files."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from pfc.data.errors import UsageError
from pfc.data.glyphs import fonts as fonts_module
from pfc.data.glyphs.fonts import find_fonts, split_fonts
from pfc.data.glyphs.glyphs import choose_characters, pack_glyphs
from pfc.data.pairs.pairs import read_pairs
from pfc.data.protocols.images import open_images
from pfc.data.protocols.table import ROLES, read_protocol
from pfc.data.records.dataset import RecordDataset

HAN = list(range(0x4E00, 0x4E00 + 60))
HANGUL = list(range(0xAC00, 0xAC00 + 20))
OPEN_LICENCE = "This Font Software is licensed under the SIL Open Font License, Version 1.1."


def make_font(path: Path, name: str, characters: list[int], weight: int = 60, licence: str = OPEN_LICENCE) -> Path:
    """A font whose characters are three bars each, at places that depend on the character alone."""
    builder = FontBuilder(1000, isTTF=True)
    glyphs = {".notdef": TTGlyphPen(None).glyph()}
    for code in characters:
        pen = TTGlyphPen(None)
        for x, y, wide in np.random.default_rng(code).integers((0, 0, 0), (700, 700, 2), (3, 3)).tolist():
            width, height = (300, weight) if wide else (weight, 300)
            pen.moveTo((x, y))
            for corner in ((x, y + height), (x + width, y + height), (x + width, y)):
                pen.lineTo(corner)
            pen.closePath()
        glyphs[f"u{code:04X}"] = pen.glyph()
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({code: f"u{code:04X}" for code in characters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=880, descent=-120)
    builder.setupNameTable(
        {"familyName": name, "styleName": "Regular", "fullName": name, "licenseDescription": licence}
    )
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)
    return path


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three fonts to train on and one, IPAexGothic by name, to hold out."""
    folder = tmp_path_factory.mktemp("fonts")
    make_font(folder / "a.ttf", "Thin Sans", HAN + HANGUL, weight=40)
    make_font(folder / "b.ttf", "Bold Sans", HAN + HANGUL, weight=120)
    make_font(folder / "c.ttf", "Plain Serif", HAN[:50] + HANGUL, weight=80)
    make_font(folder / "d.ttf", "IPAexGothic", HAN[:30], weight=60)
    return folder


@pytest.fixture(scope="module")
def pack(fonts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    def pack(**changes):
        options = {
            "identities": 20,
            "images_per_identity": 6,
            "size": 24,
            "heldout_identities": 8,
            "heldout_pairs": 40,
            "workers": 1,
            "fonts": [fonts],
        }
        out = changes.pop("out", None) or tmp_path_factory.mktemp("glyphs") / "out"
        return pack_glyphs(out, **(options | changes))

    return pack


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_parts_are_packed_and_readable(pack: Callable) -> None:
    calls: list[tuple[int, int]] = []
    summary = pack(shards=2, progress=lambda done, total: calls.append((done, total)))
    train = RecordDataset.open(summary.out / "train")
    heldout = RecordDataset.open(summary.out / "heldout")
    assert (len(train), train.num_classes, train.image_size) == (120, 20, (24, 24))
    assert (len(heldout), heldout.num_classes) == (48, 8)
    assert np.bincount(train.labels()).tolist() == [6] * 20
    assert (np.diff(train.labels()) != 0).mean() > 0.7  # shuffled
    assert len({bytes(train.read(i)[1]) for i in range(120)}) == 120  # no photograph twice
    with Image.open(io.BytesIO(bytes(train.read(0)[1]))) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (24, 24))
    pairs = read_pairs(summary.out / "heldout.bin")
    assert len(pairs.same) == 40
    assert pairs.same.sum() == 20
    search = read_protocol(summary.out / "identify.csv")
    assert [int((search.role == ROLES.index(role)).sum()) for role in ("gallery", "probe", "distractor")] == [
        4,
        44,
        120,
    ]
    assert search.images[0] == "heldout#0"
    assert len(open_images(search.images, search.folder)) == 168
    assert calls[-1] == (168, 168)
    assert (summary.identities, summary.images, summary.heldout_images, summary.heldout_pairs) == (20, 120, 48, 40)


def test_held_out_characters_and_fonts_are_not_trained_on(pack: Callable) -> None:
    summary = pack(identities=40)
    names = [json.loads((summary.out / part / "labels.json").read_text()) for part in ("train", "heldout")]
    assert not set(names[0]) & set(names[1])
    fonts = [
        json.loads((summary.out / part / "dataset.json").read_text())["creation"]["fonts"]
        for part in ("train", "heldout")
    ]
    assert tuple(fonts[0]) == summary.training_fonts == ("Bold Sans", "Plain Serif", "Thin Sans")
    assert tuple(fonts[1]) == summary.heldout_fonts == ("IPAexGothic",)


def test_the_same_seed_gives_the_same_files_with_any_number_of_workers(pack: Callable) -> None:
    one = pack(seed=5)
    assert files(one.out) == files(pack(seed=5, workers=2).out)
    assert files(one.out)["heldout.bin"] != files(pack(seed=6).out)["heldout.bin"]


def test_an_image_shows_its_own_character(pack: Callable) -> None:
    """Images of a character are more alike than images of two, in spite of fonts and distortion."""
    summary = pack(size=32, images_per_identity=12)
    dataset = RecordDataset.open(summary.out / "train")
    pictures = []
    for i in range(len(dataset)):
        with Image.open(io.BytesIO(bytes(dataset.read(i)[1]))) as image:
            gray = np.asarray(image.convert("L").resize((12, 12)), dtype=np.float64).ravel()
        pictures.append((gray - gray.mean()) / gray.std())
    labels = dataset.labels()
    means = np.array([np.mean([p for p, y in zip(pictures, labels, strict=True) if y == k], axis=0) for k in range(20)])
    nearest = (np.array(pictures) @ means.T).argmax(axis=1)
    assert (nearest == labels).mean() > 0.8  # by chance 0.05


def test_a_share_of_the_training_images_is_spoilt(pack: Callable) -> None:
    options = {"identities": 30, "images_per_identity": 20, "size": 32}
    clean, same = pack(**options), pack(**options, blurred=0.0)
    spoilt = pack(**options, blurred=0.2, tiny=0.3, mislabelled=0.1, workers=2)
    assert files(clean.out) == files(same.out)
    assert files(spoilt.out) == files(pack(**options, blurred=0.2, tiny=0.3, mislabelled=0.1).out)
    assert files(clean.out)["heldout.bin"] == files(spoilt.out)["heldout.bin"], "what judges stays as it was"
    before, after = (RecordDataset.open(summary.out / "train") for summary in (clean, spoilt))
    pairs = [(before.read(number), after.read(number)) for number in range(len(before))]
    assert 0.06 < np.mean([one[0] != other[0] for one, other in pairs]) < 0.14
    assert 0.43 < np.mean([bytes(one[1]) != bytes(other[1]) for one, other in pairs]) < 0.57

    def sharpness(image: bytes) -> float:
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("L"), dtype=np.float32)
        return float(np.abs(np.diff(pixels, axis=1)).mean())

    ratios = [sharpness(bytes(b)) / sharpness(bytes(a)) for (_, a), (_, b) in pairs if bytes(a) != bytes(b)]
    assert np.mean(ratios) < 0.7


def test_a_long_tail(pack: Callable) -> None:
    options = {"identities": 30, "images_per_identity": 12}
    even, tail = pack(**options), pack(**options, fewest_images=2)
    counts = np.bincount(RecordDataset.open(tail.out / "train").labels())
    assert (counts.max(), counts.min(), counts.sum()) == (12, 2, tail.images)
    falling = np.sort(counts)[::-1]
    assert np.abs(falling - 12 * (2 / 12) ** (np.arange(30) / 29)).max() <= 0.5
    assert counts.tolist() != falling.tolist(), "which characters are frequent does not follow their order"
    assert files(even.out)["heldout.bin"] == files(tail.out)["heldout.bin"]
    assert files(tail.out) == files(pack(**options, fewest_images=2, workers=2).out)


def test_characters_that_are_two_identities(pack: Callable) -> None:
    options = {"identities": 20, "images_per_identity": 7}
    whole, split = pack(**options), pack(**options, split=0.25)
    before, after = (RecordDataset.open(summary.out / "train") for summary in (whole, split))
    assert (after.num_classes, split.identities, split.images) == (25, 25, 140)
    same = [(before.read(number), after.read(number)) for number in range(140)]
    assert all(bytes(one[1]) == bytes(other[1]) for one, other in same), "only labels differ"
    moved = {(one[0], other[0]) for one, other in same if one[0] != other[0]}
    assert sorted(new for _, new in moved) == [20, 21, 22, 23, 24]
    counts = np.bincount(after.labels())
    assert {(int(counts[old]), int(counts[new])) for old, new in moved} == {(4, 3)}
    names = after.identity_names()
    assert all(names[new] == f"{names[old]}, again" for old, new in moved)


def make_pictures(folder: Path, codes: list[str], seed: int, ending: str = "png") -> None:
    """A coloured square on nothing for each; the colour depends on the code, its size on ``seed``."""
    folder.mkdir(parents=True)
    for code in codes:
        colour = np.random.default_rng([int(part, 16) for part in code.split("-")]).integers(0, 256, 3)
        image = np.zeros((40, 40, 4), dtype=np.uint8)
        image[8 + seed : 32 - seed, 8 + seed : 32 - seed] = [*colour, 255]
        Image.fromarray(image, "RGBA").save(folder / f"{code}.{ending}", lossless=True)


def test_folders_of_pictures_are_fonts(pack: Callable, tmp_path: Path) -> None:
    codes = [f"1f6{number:02x}" for number in range(30)] + ["1f1e9-1f1ea"]
    for seed, vendor in enumerate(("one", "two", "three")):
        make_pictures(tmp_path / "emoji" / vendor / "64", codes + [f"{code}-fe0f" for code in ("2764",)], seed)
    make_pictures(tmp_path / "emoji" / "four", [*codes, "2764"], 3, "webp")
    (tmp_path / "emoji" / "one" / "64" / "sheet.png").write_bytes(b"no code point")
    found = find_fonts([tmp_path / "emoji"])
    assert [font.name for font in found] == ["four", "one/64", "three/64", "two/64"]
    assert {len(font.characters) for font in found} == {32}
    assert all("\N{HEAVY BLACK HEART}" in font.characters for font in found), "with and without a style it is the same"
    summary = pack(
        fonts=[tmp_path / "emoji"], heldout_fonts=["four"], identities=24, size=32, out=tmp_path / "out", workers=2
    )
    assert (summary.training_fonts, summary.heldout_fonts) == (("one/64", "three/64", "two/64"), ("four",))
    dataset = RecordDataset.open(summary.out / "train")
    names = dataset.identity_names()
    assert set(names) | set(json.loads((summary.out / "heldout" / "labels.json").read_text())) == set(
        found[0].characters
    )
    own = []
    for number in range(len(dataset)):
        label, image = dataset.read(number)
        with Image.open(io.BytesIO(bytes(image))) as picture:
            middle = np.asarray(picture, dtype=np.float64)[14:18, 14:18].mean((0, 1))
        own.append(np.corrcoef(middle, np.random.default_rng([ord(part) for part in names[label]]).integers(0, 256, 3)))
    assert np.mean(own, axis=0)[0, 1] > 0.8, "each shows its own colour; by chance 0"


def test_the_held_out_characters_in_fonts_of_another_kind(pack: Callable, fonts: Path, tmp_path: Path) -> None:
    make_font(tmp_path / "brush" / "brush.ttf", "Brush", HAN[5:], weight=20)
    calls: list[tuple[int, int]] = []
    summary = pack(domains={"brush": [tmp_path / "brush"]}, progress=lambda done, total: calls.append((done, total)))
    names = {part: json.loads((summary.out / part / "labels.json").read_text()) for part in ("heldout", "brush")}
    assert names["heldout"] == names["brush"]
    assert {ord(name) for name in names["brush"]} <= set(HAN[5:30])
    assert summary.domain_fonts == {"brush": ("Brush",)}
    assert "the same characters in Brush" in str(summary)
    assert calls[-1] == (120 + 2 * 48, 120 + 2 * 48)
    assert len(read_pairs(summary.out / "brush.bin").same) == 40
    search = read_protocol(summary.out / "brush.csv")
    assert search.images[0] == "brush#0"
    with pytest.raises(UsageError, match="domain brush: Bold Sans is trained on"):
        pack(domains={"brush": [fonts / "b.ttf"]})
    drawn = [RecordDataset.open(summary.out / part) for part in ("heldout", "brush")]
    assert bytes(drawn[0].read(0)[1]) != bytes(drawn[1].read(0)[1])


def test_characters_that_all_fonts_share_come_first_and_hangul_last(fonts: Path) -> None:
    training, heldout = split_fonts(find_fonts([fonts]))

    def choose(identities: int) -> tuple[list[str], list[str]]:
        return choose_characters(training, heldout, identities=identities, heldout_identities=10, seed=0)

    shared = choose(40)[0]
    assert {ord(character) for character in shared} <= set(HAN[:50])
    everything = [ord(character) for character in choose(60)[0]]
    assert everything[:40] == [ord(character) for character in shared]
    assert set(everything[40:]) == set(HANGUL)
    with pytest.raises(UsageError, match=r"61 identities .* give 60: .*pfc\[demo\]"):
        choose(61)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identities": 0}, "identities is 0"),
        ({"images_per_identity": 1}, "images_per_identity is 1"),
        ({"size": 8}, "size is 8"),
        ({"identities": 1000}, "1000 identities asked for"),
        ({"blurred": 1.2}, "blurred is 1.2: a share of the images"),
        ({"blurred": 0.6, "tiny": 0.6}, "blurred and tiny together is 1.2"),
        ({"identities": 1, "mislabelled": 0.5}, "mislabelled images need two identities"),
        ({"heldout_identities": 31}, "share 30 Han"),
        ({"heldout_pairs": 5000}, "5000 pairs asked for"),
        ({"heldout_fonts": ["nowhere"]}, "one held out"),
        ({"heldout_fonts": ["sans", "serif"]}, "two fonts to train on"),
        ({"fonts": ["nowhere.ttf"]}, "nowhere.ttf does not exist"),
        ({"fewest_images": 7}, "fewest_images is 7: it takes 1 to 6"),
        ({"split": 1.5}, "split is 1.5: a share of the images"),
        ({"domains": {"train": []}}, "domain 'train'"),
        ({"domains": {"hand": [Path(__file__).parent]}}, "domain hand: no font in what was named"),
        ({"domains": {"a/b": []}}, "domain 'a/b'"),
    ],
)
def test_wrong_use_is_one_clear_line_and_leaves_nothing(
    pack: Callable, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pack(out=tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_not_empty_stays(pack: Callable, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(UsageError, match="not empty"):
        pack(out=tmp_path)
    assert files(tmp_path) == {"precious": b"data"}


def test_fonts_are_held_out_by_name(fonts: Path) -> None:
    everything = find_fonts([fonts])
    training, heldout = split_fonts(everything, ["serif"])
    assert [font.name for font in heldout] == ["Plain Serif"]
    assert len(training) == 3
    others = [font for font in everything if font.name != "IPAexGothic"]
    assert len(split_fonts(others)[1]) == 1  # without the usual ones another is chosen
    with pytest.raises(UsageError, match=r"pfc\[demo\]"):
        split_fonts(others[:2])


def test_fonts_found_on_the_machine_need_a_free_licence_and_many_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_free_fonts"
    many = list(range(0x4E00, 0x4E00 + 2000))
    make_font(package / "deep" / "free.ttf", "Free", many)
    make_font(package / "twin.ttf", "Free", many)
    make_font(package / "sold.ttf", "Sold", many, licence="All rights reserved.")
    make_font(package / "latin.ttf", "Few", HAN)
    (package / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fonts_module, "FONT_PACKAGES", ("some_free_fonts", "a_package_that_is_not_there"))
    monkeypatch.syspath_prepend(str(tmp_path))
    names = [font.name for font in find_fonts()]
    assert names.count("Free") == 1
    assert not {"Sold", "Few"} & set(names)
    named = [font.name for font in find_fonts([package / "sold.ttf", package / "latin.ttf"])]
    assert named == ["Few", "Sold"]
    with pytest.raises(UsageError, match="not a font"):
        find_fonts([package])
