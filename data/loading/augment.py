"""Augmentations: what may be done to a picture, how often, and the random numbers that decide it.

The numbers of a picture are drawn from (seed, visit, sample), where the visit is the epoch in every order that shows a
sample once an epoch. So they depend neither on batches, ranks and restarts, nor on which other augmentations are on.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..order.orders import Integers, counter_hash

Probability = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[list[float], Field(min_length=2, max_length=2)]

FLIP_STREAM = 1  # of the hashes; another number for each augmentation below, never to be changed
_STREAMS = {"crop": 2, "colour": 3, "gray": 4, "low_resolution": 5, "blur": 6, "jpeg": 7, "cutout": 8}

Drawn = dict[str, NDArray[np.generic]]
"""Name of a parameter → one value (or pair of values) for each picture: [b] or [b, 2]. ``NAME`` itself, bool [b], says
which pictures the augmentation NAME is applied to; ``NAME_parameter`` is float32 or int32."""


class _Augmentation(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    probability: Probability = 0.0
    """Share of the pictures that it is applied to; 0 is off."""

    @model_validator(mode="after")
    def _ranges(self) -> "_Augmentation":
        for name, (least, most) in _LIMITS.get(type(self).__name__, {}).items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(
                    f"{name}: found [{low:g}, {high:g}], allowed: [low, high] within [{least:g}, {most:g}]"
                )
        return self


class Crop(_Augmentation):
    """A random part of the picture as it is shown without this, scaled to its whole size."""

    area: Range = [0.7, 1.0]
    """Share of that area."""
    aspect: Range = [0.8, 1.25]
    """Width by height of the part, relative to the whole; a part never reaches beyond it."""


class Colour(_Augmentation):
    """Brightness, contrast and saturation times a factor from [1 − x, 1 + x], hue turned by up to ±hue degrees."""

    brightness: Probability = 0.3
    contrast: Probability = 0.3
    saturation: Probability = 0.3
    hue: Annotated[float, Field(ge=0, le=180)] = 5.0


class Gray(_Augmentation):
    """Colours away."""


class LowResolution(_Augmentation):
    """Scaled down and up again, as a picture from far away looks."""

    scale: Range = [0.25, 1.0]
    """Side of the small picture, as a share of the full one."""


class Blur(_Augmentation):
    """Gaussian blur."""

    sigma: Range = [0.3, 2.0]
    """Pixels."""


class Jpeg(_Augmentation):
    """Compressed as JPEG once more."""

    quality: Range = [20.0, 80.0]
    """1 to 100."""


class Cutout(_Augmentation):
    """A gray rectangle somewhere on the picture."""

    area: Range = [0.02, 0.2]
    """Share of the picture's area."""
    aspect: Range = [0.5, 2.0]
    """Width by height of the rectangle, relative to the picture's own."""


_LIMITS = {
    "Crop": {"area": (0.01, 1.0), "aspect": (0.1, 10.0)},
    "LowResolution": {"scale": (0.05, 1.0)},
    "Blur": {"sigma": (0.05, 20.0)},
    "Jpeg": {"quality": (1.0, 100.0)},
    "Cutout": {"area": (0.001, 1.0), "aspect": (0.1, 10.0)},
}


class Augment(BaseModel):
    """All of them, in the order in which they are applied; every one is off by default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    crop: Crop = Crop()
    colour: Colour = Colour()
    gray: Gray = Gray()
    low_resolution: LowResolution = LowResolution()
    blur: Blur = Blur()
    jpeg: Jpeg = Jpeg()
    cutout: Cutout = Cutout()

    @property
    def active(self) -> list[str]:
        """The names of those that are on."""
        return [name for name in _STREAMS if getattr(self, name).probability > 0]

    @property
    def drawn(self) -> list[str]:
        """The names of what ``draw`` returns."""
        nothing = np.zeros(0, dtype=np.int64)
        return list(self.draw(0, nothing, nothing))

    def draw(self, seed: int, visits: Integers, samples: Integers) -> Drawn:
        """The parameters of every augmentation that is on, for pictures named by (visit, sample): int64 [b] each."""
        drawn: Drawn = {}
        for name in self.active:
            section = getattr(self, name)
            bits = counter_hash(seed, _STREAMS[name], visits[None], samples[None], np.arange(5)[:, None])
            coin, *numbers = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53  # uniform in [0, 1)
            drawn[name] = coin < section.probability
            for parameter, values in _PARAMETERS[name](section, *numbers).items():
                drawn[f"{name}_{parameter}"] = values
        return drawn


def draw_flips(seed: int, visits: Integers, samples: Integers) -> NDArray[np.int32]:
    """Which pictures are mirrored, left to right: half of them, int32 [b]."""
    return (counter_hash(seed, FLIP_STREAM, visits, samples) >> np.uint64(63)).astype(np.int32)


Uniform = NDArray[np.float64]


def _crop(section: Crop, a: Uniform, b: Uniform, c: Uniform, d: Uniform) -> Drawn:
    height, width = _sides(section, a, b)
    start = np.stack([c * (1 - height), d * (1 - width)], axis=1)
    return {"start": _floats(start), "end": _floats(start + np.stack([height, width], axis=1))}


def _colour(section: Colour, a: Uniform, b: Uniform, c: Uniform, d: Uniform) -> Drawn:
    return {
        "brightness": _floats(1 + section.brightness * (2 * a - 1)),
        "contrast": _floats(1 + section.contrast * (2 * b - 1)),
        "saturation": _floats(1 + section.saturation * (2 * c - 1)),
        "hue": _floats(section.hue * (2 * d - 1)),
    }


def _low_resolution(section: LowResolution, a: Uniform, *_: Uniform) -> Drawn:
    return {"scale": _floats(_between(section.scale, a))}


def _blur(section: Blur, a: Uniform, *_: Uniform) -> Drawn:
    return {"sigma": _floats(_between(section.sigma, a))}


def _jpeg(section: Jpeg, a: Uniform, *_: Uniform) -> Drawn:
    return {"quality": np.round(_between(section.quality, a)).astype(np.int32)}


def _cutout(section: Cutout, a: Uniform, b: Uniform, c: Uniform, d: Uniform) -> Drawn:
    height, width = _sides(section, a, b)
    return {
        "anchor": _floats(np.stack([c * (1 - height), d * (1 - width)], axis=1)),
        "shape": _floats(np.stack([height, width], axis=1)),
    }


_PARAMETERS = {
    "crop": _crop,
    "colour": _colour,
    "gray": lambda section, *_: {},
    "low_resolution": _low_resolution,
    "blur": _blur,
    "jpeg": _jpeg,
    "cutout": _cutout,
}


def _sides(section: Crop | Cutout, a: Uniform, b: Uniform) -> tuple[Uniform, Uniform]:
    """Height and width of a rectangle, as shares of the picture's; the logarithm of the aspect is uniform."""
    area, aspect = _between(section.area, a), np.exp(_between(np.log(section.aspect), b))
    return np.minimum(np.sqrt(area / aspect), 1), np.minimum(np.sqrt(area * aspect), 1)


def _between(bounds: "list[float] | NDArray[np.float64]", uniform: Uniform) -> Uniform:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform


def _floats(values: Uniform) -> NDArray[np.float32]:
    return values.astype(np.float32)
