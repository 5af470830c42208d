"""Five-point alignment: a face turned, scaled and moved to where networks are trained to see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import UsageError
from .records.manifest import printable

LANDMARK_COLUMNS = tuple(f"{axis}{point}" for point in range(1, 6) for axis in "xy")
"""x1, y1, ..., x5, y5: left eye, right eye, nose, left and right corner of the mouth, left and right as one sees them;
in pixels of the upright image, (0, 0) in the middle of the first one."""
TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
"""Where ArcFace has the five points in 112 × 112 pixels (Deng et al. 2019)."""
_SIDE = 112

Landmarks = NDArray[np.float32]


def landmark_columns(path: Path, columns: Sequence[str]) -> tuple[str, ...]:
    """Those of ``LANDMARK_COLUMNS`` that the table has: all ten or none; UsageError where only some are there."""
    missing = [name for name in LANDMARK_COLUMNS if name not in columns]
    if missing and len(missing) < len(LANDMARK_COLUMNS):
        raise UsageError(f"{path} has landmarks, but no column {missing[0]}: five points are x1, y1, ..., x5, y5")
    return () if missing else LANDMARK_COLUMNS


def parse_landmarks(where: str, values: Sequence[Any]) -> list[float]:
    """The ten numbers of a row, NaN where it has none; UsageError where it has only some, or one is no number."""
    given = [value is not None and value != "" and value == value for value in values]
    if not any(given):
        return [math.nan] * len(LANDMARK_COLUMNS)
    if not all(given):
        raise UsageError(
            f"{where} has no {LANDMARK_COLUMNS[given.index(False)]}: give all ten numbers of its landmarks, or none"
        )
    numbers = []
    for name, value in zip(LANDMARK_COLUMNS, values, strict=True):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise UsageError(f"{where}: {name} {printable(str(value))} is no number")
    return numbers


def need_alignment() -> Any:
    """scikit-image's SimilarityTransform; UsageError where it is not installed."""
    try:
        from skimage.transform import SimilarityTransform
    except ImportError:
        raise UsageError("to align faces needs one more package: pip install 'pfc[align]'") from None
    return SimilarityTransform


def template_for(size: tuple[int, int]) -> NDArray[np.float64]:
    """The template's points [5, 2] in an image of ``size`` (height, width): as high as it, in the middle of its width.

    So 112 × 96 has them 8 pixels further left than 112 × 112, as networks for that size are trained.
    """
    height, width = size
    return (TEMPLATE - (_SIDE / 2, 0)) * (height / _SIDE) + (width / 2, 0)


def align(image: Image.Image, landmarks: Landmarks, size: tuple[int, int]) -> Image.Image:
    """The image warped so that its landmarks come nearest to the template's, black where it does not reach.

    By a similarity transform (rotation, scale, shift; least squares, Umeyama 1991) and bilinear interpolation: a
    mirrored face stays mirrored.

    Args:
        image: RGB, upright.
        landmarks: float32 [5, 2], see ``LANDMARK_COLUMNS``.
        size: (height, width) of the result.

    Raises:
        ValueError: the landmarks are one point.
        UsageError: scikit-image is not installed.
    """
    transform = need_alignment().from_estimate(landmarks.astype(np.float64), template_for(size))
    if not transform:
        raise ValueError("its landmarks are one point")
    (a, b, c), (d, e, f) = transform.inverse.params[:2]  # from the pixels of the result to those of the image
    # Pillow counts from a pixel's corner, landmarks from its middle.
    corner = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)
    height, width = size
    return image.transform((width, height), Image.Transform.AFFINE, corner, Image.Resampling.BILINEAR)
