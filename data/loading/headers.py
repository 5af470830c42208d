"""Whether an encoded image begins as one: DALI's parsers end the whole process on a header that they cannot read.

(DALI 2.4: a segmentation fault a little after the error, found by trying. Damage behind a header that can be read is an
ordinary error, see ``dali.undecodable``.)
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image

_SEGMENT = struct.Struct(">BBH")  # 0xFF, marker, length with its own two bytes
_FRAME = struct.Struct(">HHB")  # height, width, components
_CHUNK = struct.Struct(">I4s")  # length, type
_RIFF_CHUNK = struct.Struct("<4sI")  # type, length
_PNG_HEADER = struct.Struct(">IIBB")  # width, height, bits, colour type
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_PNM_MAXIMUM = re.compile(rb"P[2356](?:\s+(?:#[^\n]*\n\s*)*(\d+)){3}")  # behind width and height
_DECODABLE = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "PPM", "TIFF", "JPEG2000")  # by Pillow's names, as are
_OTHER_MODES = {"PPM": ("F",), "TIFF": ("1", "LA", "I", "F"), "JPEG2000": ("LA",)}  # those that DALI does not know
_SCAN, _EXIF = 0xDA, 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 … SOF15; the others are tables
MOST_PIXELS = 1 << 27  # as in plain.c: a few bytes can claim any number, and a decoder allocates what they claim


class _BadHeader(ValueError):
    """What is wrong with a header."""


def header_problem(image: np.ndarray) -> str | None:
    """What is wrong with the header of an encoded image (uint8 [bytes]), None if DALI may be given it.

    JPEG is read segment by segment up to its pixels; PNG chunk by chunk to its end. Any other format is decoded
    by Pillow, which takes long, but such data sets are rare.
    """
    parse = _parser(image.data)
    if parse is None:
        return pillow_problem(image)
    try:
        parse(image.data)
    except _BadHeader as error:
        return str(error)
    return None


def header_size(image: np.ndarray) -> tuple[int, int] | None:
    """(height, width) by the header of an encoded image that has no ``header_problem``; None if a decoder may turn the
    picture, by its EXIF data, and that would change its size."""
    parse = _parser(image.data)
    if parse is not None:
        height, width, has_exif = parse(image.data)
    else:
        with Image.open(io.BytesIO(bytes(image))) as picture:
            height, width, has_exif = picture.height, picture.width, bool(picture.getexif())
    return None if has_exif and height != width else (height, width)


def _parser(data: memoryview) -> Callable[[memoryview], tuple[int, int, bool]] | None:
    """The function that reads height, width and whether there are EXIF data from the header, or raises _BadHeader."""
    if data[:3] == _JPEG:
        return _read_jpeg
    return _read_png if data[:8] == _PNG else None


def _read_jpeg(data: memoryview) -> tuple[int, int, bool]:
    at, end, has_exif = 2, len(data), False
    height = width = 0
    while at + _SEGMENT.size <= end:
        start, marker, length = _SEGMENT.unpack_from(data, at)
        if start != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            raise _BadHeader(f"no JPEG marker at byte {at}")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if length < 2 or at + 2 + length > end:
            raise _BadHeader(f"the JPEG segment at byte {at} is cut off")
        if marker == _SCAN:
            if not height:
                raise _BadHeader("the JPEG has no frame header")
            return height, width, has_exif
        has_exif |= marker == _EXIF
        if marker in _FRAMES:
            if length < 8:
                raise _BadHeader("the JPEG frame header is cut off")
            height, width, components = _FRAME.unpack_from(data, at + 5)
            if not (height and width and components in (1, 3, 4)):
                raise _BadHeader("the JPEG frame has no pixels")
            if height * width > MOST_PIXELS:
                raise _BadHeader(_too_large(height, width))
        at += 2 + length
    raise _BadHeader("the JPEG ends before its pixels")


def _read_png(data: memoryview) -> tuple[int, int, bool]:
    at, last, has_exif = len(_PNG), len(data) - _CHUNK.size, False
    height = width = 0
    while at <= last:
        length, kind = _CHUNK.unpack_from(data, at)
        if at == len(_PNG):
            if kind != b"IHDR" or length != 13 or len(data) < at + 21:
                raise _BadHeader("the PNG does not begin with its header")
            width, height, depth, colour = _PNG_HEADER.unpack_from(data, at + 8)
            if not (width and height) or depth not in (1, 2, 4, 8, 16) or colour not in (0, 2, 3, 4, 6):
                raise _BadHeader("the PNG's header says nothing sensible")
            if height * width > MOST_PIXELS:
                raise _BadHeader(_too_large(height, width))
        has_exif |= kind == b"eXIf"
        if kind == b"IEND" and at + 12 <= len(data):
            return height, width, has_exif
        if kind == b"IEND":
            break
        at += _CHUNK.size + length + 4
    raise _BadHeader("the PNG is cut off")


def _too_large(height: int, width: int) -> str:
    return f"its header claims {height}x{width} pixels, more than {MOST_PIXELS:,} in all"


def pillow_problem(image: bytes | np.ndarray) -> str | None:
    """What Pillow says about an encoded image, None where it can decode it."""
    from ..images import why_unreadable

    try:
        with Image.open(io.BytesIO(bytes(image))) as picture:
            if picture.format not in _DECODABLE:
                return f"DALI does not decode {picture.format}"
            if picture.mode in _OTHER_MODES.get(picture.format, ()):
                return f"DALI does not decode {picture.format} of mode {picture.mode}"
            if picture.height * picture.width > MOST_PIXELS:
                return _too_large(picture.height, picture.width)
            picture.load()
            if picture.format == "PPM":
                return _pnm_problem(bytes(image))
            if picture.format == "WEBP":
                return _webp_problem(bytes(image))
    except Exception as error:  # a damaged file can raise nearly anything from within a decoder
        return why_unreadable(error)
    return None


def _pnm_problem(data: bytes) -> str | None:
    """DALI takes the numbers as they are: with another maximum the picture would be too dark."""
    found = _PNM_MAXIMUM.match(data)
    if found is not None and int(found[1]) not in (255, 65535):
        return f"DALI does not scale PGM and PPM of maximum {int(found[1])}, only of 255 and 65535"
    return None


def _webp_problem(data: bytes) -> str | None:
    """DALI looks for EXIF data without skipping the padding of the chunks before, and refuses what it finds there."""
    at, odd = 12, False
    while at + _RIFF_CHUNK.size <= len(data):
        kind, length = _RIFF_CHUNK.unpack_from(data, at)
        if kind == b"EXIF" and odd:
            return "DALI does not read a WebP whose EXIF data come after a chunk of odd length"
        odd |= length % 2 == 1
        at += _RIFF_CHUNK.size + length + length % 2
    return None
