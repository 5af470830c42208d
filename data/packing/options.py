"""The options of packing that every kind of source has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ..errors import UsageError
from ..images import Encoding
from ..workers import Progress
from .storing import Storing


@dataclass(frozen=True)
class PackOptions:
    """How to pack; UsageError if the size, quality or encoding is impossible.

    size: height and width of the stored images in pixels; a number for squares, None for each image's own. An image is
    scaled until it covers the size, and the rest is cut off on both sides alike.
    quality, encoding: of images that have to be encoded; those that are what they shall be keep their bytes.
    keep_bytes: all images keep their bytes, whatever they are. check: decode them nevertheless, to find those that
    cannot be read.
    min_images: leave out identities with fewer images. only, without: text files with an identity's name a line: pack
    these alone, or all others. without_images: a text file with the number of an image a line, counted from 0 in the
    order of the source: leave these out.
    keep_labels: labels stay the numbers that the source gives; otherwise they are 0, 1, ...
    shards: how many ``.rec`` files; or images_per_shard, how many images each of them has at most.
    shuffle: all images over all shards, by ``seed``; otherwise they stay in the order of the source.
    workers: processes, None for one a core. The result does not depend on it.
    name: of the data set, None for its folder's. overwrite: replace a packed data set at OUT, nothing else.
    strict: stop at the first image that cannot be read; otherwise it is left out, counted and named.
    progress: called as progress(done, total).
    """

    size: int | tuple[int, int] | None = None
    quality: int = 95
    encoding: Encoding = "jpeg"
    keep_bytes: bool = False
    check: bool = True
    min_images: int = 1
    only: str | Path | None = None
    without: str | Path | None = None
    without_images: str | Path | None = None
    keep_labels: bool = False
    shards: int = 1
    images_per_shard: int | None = None
    shuffle: bool = True
    seed: int = 0
    workers: int | None = None
    name: str | None = None
    overwrite: bool = False
    strict: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UsageError(f"quality {self.quality}: JPEG qualities go from 1 to 100")
        if self.encoding not in get_args(Encoding):
            raise UsageError(f"encoding {self.encoding!r}: it is one of {', '.join(get_args(Encoding))}")
        if self.size is not None:
            height, width = both_sides(self.size)
            if height < 1 or width < 1:
                raise UsageError(f"size {height}×{width}: height and width are at least 1 pixel")
            if self.keep_bytes:
                raise UsageError(f"images cannot keep their bytes and become {height}×{width} too: choose one of both")

    def storing(self) -> Storing:
        """The options that concern the images' bytes."""
        size = None if self.size is None else both_sides(self.size)
        return Storing(size, self.quality, self.encoding, self.keep_bytes, self.check)


def both_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width); a number stands for a square."""
    return (size, size) if isinstance(size, int) else size
