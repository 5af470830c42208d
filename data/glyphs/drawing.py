"""One photograph of a character, drawn in a font, or of a picture of it: turned, sheared, scaled, shifted, blurred and
lit at random."""

import math
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from ..images import encode_image
from .fonts import PICTURES

_OVERSAMPLING = 2  # drawn larger and reduced at the end, which keeps thin strokes from breaking up
_EM = 0.78  # of the image's side, before the random scale


class Photograph(NamedTuple):
    """A task of ``draw_glyph``; ``key`` seeds its random numbers."""

    label: int
    character: str
    path: str
    """Of a font, or of a picture of the character."""
    key: tuple[int, ...]
    spoilt: Literal["", "blurred", "tiny"] = ""
    """How the finished picture is made worse: out of focus, or of few pixels, enlarged."""


def draw_glyph(photograph: Photograph, *, size: int, quality: int) -> tuple[int, bytes]:
    """The label and the JPEG file, ``size`` × ``size`` pixels, of a photograph; a function of the arguments alone."""
    generator = np.random.default_rng(photograph.key)
    side = size * _OVERSAMPLING
    coloured = Path(photograph.path).suffix.lower() in PICTURES
    drawn = _picture(photograph.path, side) if coloured else _printed(photograph, side, generator)
    drawn = drawn.transform(drawn.size, Image.Transform.AFFINE, _affine(generator, side), Image.Resampling.BILINEAR)
    drawn = drawn.filter(ImageFilter.GaussianBlur(generator.uniform(0.0, 0.015) * side)).reduce(_OVERSAMPLING)
    light = np.frombuffer(drawn.tobytes(), np.uint8).reshape(size, size, -1).astype(np.float32) / np.float32(255)
    picture = Image.fromarray(_light(light[..., -1:], generator, light[..., :-1] if coloured else None))
    if photograph.spoilt == "blurred":
        picture = picture.filter(ImageFilter.GaussianBlur(generator.uniform(0.04, 0.09) * size))
    elif photograph.spoilt == "tiny":
        few = max(4, round(generator.uniform(0.2, 0.35) * size))
        picture = picture.resize((few, few), Image.Resampling.BOX).resize((size, size), Image.Resampling.BICUBIC)
    return photograph.label, encode_image(picture, quality=quality, encoding="jpeg")


def _printed(photograph: Photograph, side: int, generator: np.random.Generator) -> Image.Image:
    """The character in the middle, white on black: mode L, side × side pixels."""
    font = _font(photograph.path, round(side * _EM))
    stroke = max(0.0, generator.uniform(-1.5, 1.0)) * side / 80  # most images keep the font's own weight
    mask = Image.new("L", (side, side))
    left, top, right, bottom = font.getbbox(photograph.character)
    corner = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(mask).text(corner, photograph.character, fill=255, font=font, stroke_width=stroke)
    return mask


def _picture(path: str, side: int) -> Image.Image:
    """The picture in the middle: mode RGBa (colours times their opacity), side × side pixels."""
    with Image.open(path) as file:
        picture = file.convert("RGBA")
    largest = round(side * _EM)
    picture = ImageOps.contain(picture, (largest, largest), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas.convert("RGBa")


@lru_cache(maxsize=64)
def _font(path: str, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, pixels)


def _affine(generator: np.random.Generator, side: int) -> tuple[float, float, float, float, float, float]:
    """Coefficients that take a point of the result to one of the drawing: rotation, shear, scale, shift."""
    angle = math.radians(generator.uniform(-8, 8))
    shear = generator.uniform(-0.12, 0.12)
    scale = generator.uniform(0.85, 1.12)
    stretch = generator.uniform(0.93, 1.07)
    forward = (
        np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        @ np.array([[1.0, shear], [0.0, 1.0]])
        @ np.diag([scale * stretch, scale / stretch])
    )
    inverse = np.linalg.inv(forward)
    centre = np.full(2, side / 2)
    offset = centre - inverse @ (centre + generator.uniform(-0.05, 0.05, 2) * side)
    (a, b), (d, e) = inverse.tolist()
    return a, b, float(offset[0]), d, e, float(offset[1])


def _light(
    mask: NDArray[np.float32], generator: np.random.Generator, colours: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """On paper under uneven light: mask [S, S, 1] in [0, 1] → RGB uint8 [S, S, 3].

    Args:
        colours: of a picture, [S, S, 3] in [0, 1], times ``mask``; None: ink of one colour.
    """
    size = mask.shape[0]
    paper = generator.uniform(0.6, 1.0) + generator.uniform(-0.08, 0.08, 3)
    ink = paper - generator.uniform(0.4, 0.9) + generator.uniform(-0.08, 0.08, 3)
    patches = Image.fromarray(generator.uniform(-1, 1, (3, 3)).astype(np.float32))
    shade = np.asarray(patches.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    grain = generator.standard_normal((size, size, 1), dtype=np.float32)
    if colours is None:
        seen = paper + (ink - paper) * mask
    else:  # faded, and tinted as the ink would be
        seen = paper * (1 - mask) + colours * generator.uniform(0.6, 1.0) + (ink - ink.mean()) * mask
    picture = seen + generator.uniform(0, 0.12) * shade + generator.uniform(0, 0.06) * grain
    return (picture.clip(0, 1) * 255).astype(np.uint8)
