"""Turns an image file into the bytes that a record stores."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .alignment import Landmarks, align

Encoding = Literal["jpeg", "png"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".pgm")

_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_BACKGROUND = "white"  # behind transparent images


def reencode(
    data: bytes,
    *,
    size: tuple[int, int] | None,
    quality: int,
    encoding: Encoding,
    landmarks: Landmarks | None = None,
) -> bytes:
    """The image file ``data`` as JPEG or PNG of ``size`` (height, width), as RGB; None keeps its own size.

    With ``landmarks`` (float32 [5, 2]) the face is aligned to ``size``; otherwise the image is scaled to cover it and
    cropped at the centre, and keeps its bytes untouched where it is all that already. Raises whatever Pillow raises
    where it cannot be read, and what ``align`` raises.
    """
    with Image.open(io.BytesIO(data)) as image:
        if landmarks is None and _is_ready(image, size, encoding):
            image.load()
            return data
        if size is not None and landmarks is None:
            # JPEG can be decoded at 1/2, 1/4, 1/8: much faster, and as good at twice the size.
            image.draft("RGB", (2 * max(size), 2 * max(size)))
        upright = to_rgb(ImageOps.exif_transpose(image))
    if size is not None and landmarks is not None:
        upright = align(upright, landmarks, size)
    elif size is not None:
        height, width = size
        upright = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    return encode_image(upright, quality=quality, encoding=encoding)


def encode_image(image: Image.Image, *, quality: int, encoding: Encoding) -> bytes:
    """JPEG bytes at ``quality`` (1 … 100), or PNG bytes."""
    out = io.BytesIO()
    if encoding == "jpeg":
        image.save(out, "JPEG", quality=quality)
    else:
        image.save(out, "PNG")
    return out.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB: gray and palette widened, 16-bit gray brought to 8 bits, transparency laid on white.

    ValueError for gray of 32 bits or of floats, since nothing says which of its values is white.
    """
    if image.mode == "F":
        raise ValueError("its gray is in floating-point numbers of no known range: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() >= 1 << 16:  # 16-bit files may be of mode I, too, for 32 bits
            raise ValueError("its gray has 32 bits and no known range: convert it to 8 or 16 bits")
        return Image.fromarray((pixels.astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, _BACKGROUND)
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def why_unreadable(error: Exception) -> str:
    """One line that says what Pillow's ``error`` about an image means; where it is not about the image, but the machine
    lacks memory or may open no more files, it is raised again."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
        raise error
    if isinstance(error, UnidentifiedImageError):
        return "no image format starts like this"
    return " ".join(str(error).split()) or type(error).__name__


def _is_ready(image: Image.Image, size: tuple[int, int] | None, encoding: Encoding) -> bool:
    return (
        image.format == encoding.upper()
        and image.mode in ("RGB", "L")
        and (size is None or image.size == (size[1], size[0]))
        and not image.has_transparency_data
        and not getattr(image, "is_animated", False)
        and image.getexif().get(_ORIENTATION, 1) == 1
    )
