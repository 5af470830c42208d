"""How the images of a source become the bytes that a record stores."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..alignment import Landmarks
from ..images import Encoding, reencode, why_unreadable


@dataclass(frozen=True)
class Storing:
    """How to store images: of ``size`` (height, width; None: each its own), as JPEG of ``quality`` or as PNG.

    keep_bytes: as they are, whatever size and format they have. check: decode an image that keeps its bytes, to
    find out whether it can be read.
    """

    size: tuple[int, int] | None
    quality: int
    encoding: Encoding
    keep_bytes: bool = False
    check: bool = True

    def __call__(self, data: bytes, landmarks: Landmarks | None = None) -> bytes | str:
        """The bytes to store for the image file ``data``, or why it cannot be read; aligned where it has landmarks."""
        if not data:
            return "it is empty"
        if self.keep_bytes and not self.check:
            return data
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks about odd metadata of an image that it can read
                if not self.keep_bytes:
                    return reencode(
                        data, size=self.size, quality=self.quality, encoding=self.encoding, landmarks=landmarks
                    )
                with Image.open(io.BytesIO(data)) as image:
                    image.load()
                return data
        except Exception as error:  # Pillow's decoders raise nearly anything about a damaged file
            return why_unreadable(error)

    def to_dict(self) -> dict[str, Any]:
        """What dataset.json says of it."""
        if self.keep_bytes:
            return {"keep_bytes": True}
        return {"size": self.size, "quality": self.quality, "encoding": self.encoding}
