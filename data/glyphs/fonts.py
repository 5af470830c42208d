"""Freely licensed fonts that draw Han characters or Hangul, and folders of emoji: finding them, and deciding which to
train on."""

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import UsageError

# pip packages of the `demo` extra that carry such fonts, by the name they are imported by.
FONT_PACKAGES = (
    "cvttf_NotoSansCJK_Thin",
    "cvttf_NotoSansCJK_Regular",
    "cvttf_NotoSansCJK_Black",
    "pylopdf_fonts_zh_cn",
    "pylopdf_fonts_jp",
    "japanize_matplotlib",
)

HAN = range(0x4E00, 0xA000)
HANGUL = range(0xAC00, 0xD7A4)

# Held out by default, whatever else is installed: a gothic of another foundry than the training fonts', and a serif
# that shares its designers with Noto Serif SC, which is trained on, but has the Japanese forms of the characters.
_HELDOUT = re.compile(
    r"IPA(ex|P|exP)?Gothic|Noto Serif (CJK )?JP|Source Han Serif(?! (K|SC|TC|HC|CN|TW|KR|HK)\b)", re.IGNORECASE
)
_FREE_LICENCE = re.compile(
    r"open font licen[sc]e|scripts\.sil\.org|openfontlicense|ipa font|ipafont|arphic public|apache|"
    r"general public|\bGPL\b|CC0",
    re.IGNORECASE,
)
_FILES = (".ttf", ".otf", ".ttc", ".otc", ".woff", ".woff2")
PICTURES = (".png", ".webp")
_NAMED_BY_CODE = re.compile(r"[0-9a-f]{4,6}([-_][0-9a-f]{4,6})*")
_STYLE = "\ufe0f"  # "as a picture, not as a letter": some name it, some do not
_ENOUGH = 2000  # a font that draws fewer of our characters is one for another script


@dataclass(frozen=True)
class Font:
    """A font file, of a collection (.ttc) its first face, as the others share most of its shapes; or a folder of
    pictures.

    Attributes:
        name: full name, e.g. "Noto Sans CJK TC Bold"; of a folder its path from the folder that was named.
        path: the file or the folder.
        characters: the Han characters and Hangul syllables that it draws; or all that there are pictures of.
        pictures: character → file, where it is a folder.
    """

    name: str
    path: Path
    characters: frozenset[str]
    pictures: Mapping[str, Path] | None = None

    def file_of(self, character: str) -> Path:
        """What a character is drawn with."""
        return self.path if self.pictures is None else self.pictures[character]


def font_directories() -> list[Path]:
    """Where fonts are looked for: the packages of the `demo` extra, then the machine's own font directories."""
    home = Path.home()
    if sys.platform == "darwin":
        machine = [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    elif sys.platform == "win32":
        machine = [Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"]
    else:
        machine = [
            Path("/usr/share/fonts"),
            Path("/usr/local/share/fonts"),
            home / ".local/share/fonts",
            home / ".fonts",
        ]
    packages = []
    for package in FONT_PACKAGES:
        spec = find_spec(package)  # finds without importing: japanize_matplotlib fails on import since Python 3.12
        packages += [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return [directory for directory in (*packages, *machine) if directory.is_dir()]


def find_fonts(paths: Iterable[str | Path] | None = None) -> list[Font]:
    """The usable fonts among ``paths`` (files or directories), or on this machine, ordered by name.

    A folder of pictures named by code points in hexadecimal (1f600.png, 1f1e9-1f1ea.png: emoji) is a font as well.
    Of faces with the same name one is kept. Fonts found on the machine count only if they say that their licence is a
    free one; files that are named count as they are.

    Raises:
        UsageError: a path does not exist or is no font.
    """
    named = paths is not None
    files: list[Path] = []
    found: dict[str, Font] = {}
    for path in map(Path, paths if paths is not None else font_directories()):
        if not path.exists():
            raise UsageError(f"font {path} does not exist: name a font file or a directory with fonts")
        files += sorted(file for file in path.rglob("*") if file.suffix.lower() in _FILES) if path.is_dir() else [path]
        if named and path.is_dir():
            for font in _folders_of_pictures(path):
                found.setdefault(font.name, font)
    for file in files:
        font = _open(file, named=named)
        if font:
            found.setdefault(font.name, font)
    return [found[name] for name in sorted(found)]


def split_fonts(fonts: list[Font], heldout: Iterable[str] | None = None) -> tuple[list[Font], list[Font]]:
    """Divide fonts into those to train on and those held out.

    Args:
        heldout: parts of the names of the fonts to hold out; by default IPAexGothic and Noto Serif JP, or, where
            neither is there, every fourth font by name.

    Raises:
        UsageError: fewer than two fonts to train on or none held out.
    """
    if heldout is not None:
        parts = [part.lower() for part in heldout]
        chosen = [font for font in fonts if any(part in font.name.lower() for part in parts)]
    else:
        chosen = [font for font in fonts if _HELDOUT.search(font.name)] or fonts[::4]
    training = [font for font in fonts if font not in chosen]
    if len(training) < 2 or not chosen:
        names = ", ".join(font.name for font in fonts) or "none"
        raise UsageError(
            f"glyphs need at least two fonts to train on and one held out, with Han characters (found: {names}): "
            "install the packaged ones with `pip install 'pfc[demo]'`"
        )
    return training, chosen


def _open(file: Path, named: bool) -> Font | None:
    """The font in ``file``; None if it cannot be used. If the user named it, any licence and few characters do."""
    from fontTools.ttLib import TTFont, TTLibError

    try:
        face = TTFont(str(file), fontNumber=0, lazy=True)
    except (TTLibError, OSError) as error:
        if named:
            raise UsageError(f"{file} is not a font that can be read: {error}") from error
        return None  # a broken file among the machine's own fonts does not concern the user
    with face:
        names = face["name"]
        if not named and not _FREE_LICENCE.search(" ".join(names.getDebugName(i) or "" for i in (0, 13, 14))):
            return None
        characters = frozenset(chr(code) for code in face.getBestCmap() or {} if code in HAN or code in HANGUL)
        if len(characters) < (1 if named else _ENOUGH):
            return None
        return Font(names.getDebugName(4) or file.stem, file, characters)


def _folders_of_pictures(root: Path) -> list[Font]:
    """The folders under ``root``, and itself, that have pictures of characters."""
    folders: dict[Path, dict[str, Path]] = {}
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() in PICTURES and _NAMED_BY_CODE.fullmatch(file.stem.lower()):
            codes = re.split("[-_]", file.stem)
            if max(int(code, 16) for code in codes) <= sys.maxunicode:
                character = "".join(chr(int(code, 16)) for code in codes).replace(_STYLE, "")
                folders.setdefault(file.parent, {}).setdefault(character, file)
    return [
        Font(str(folder.relative_to(root)) if folder != root else root.name, folder, frozenset(pictures), pictures)
        for folder, pictures in folders.items()
        if len(pictures) > 1
    ]
