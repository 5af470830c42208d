"""Packs made-up images, for tests and benchmarks: each identity is a smooth coloured pattern."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UsageError
from ..images import encode_image
from ..packing.options import both_sides
from ..packing.summary import PackSummary
from ..packing.writer import ShardedWriter
from ..workers import Progress, end_unguarded_worker, parallel_map

_GRID = 6  # random colours a side that a pattern is smoothed from
_NOISE = 12.0  # standard deviation of a pixel's noise, of 255


def pack_synthetic(
    out: str | Path,
    *,
    identities: int,
    images_per_identity: int,
    size: int | tuple[int, int] = 112,
    quality: int = 90,
    shards: int = 1,
    workers: int | None = None,
    seed: int = 0,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackSummary:
    """Pack identities × images_per_identity JPEG images of ``size`` (pixels, or (height, width)), shuffled.

    An identity is a smooth pattern of random colours; each of its images sees it shifted by up to an eighth
    of the size, brighter or darker, and noisy. Every pixel is a function of (seed, identity, image).
    UsageError on impossible numbers and where ``out`` holds something.
    """
    end_unguarded_worker()
    height, width = both_sides(size)
    wanted = {
        "identities": identities,
        "images_per_identity": images_per_identity,
        "height": height,
        "width": width,
    }
    for what, number in wanted.items():
        if number < 1:
            raise UsageError(f"{what} {number}: it takes at least 1")
    total = identities * images_per_identity
    order = np.random.default_rng(seed).permutation(total)
    render = partial(_render, per_identity=images_per_identity, height=height, width=width, quality=quality, seed=seed)
    writer = ShardedWriter(
        out,
        identities=identities,
        image_size=(height, width),
        source="synthetic",
        name=name,
        creation=wanted | {"quality": quality, "shards": shards, "seed": seed},
        shards=shards,
        overwrite=overwrite,
    )
    with writer:
        images = parallel_map(render, order.tolist(), workers=workers)
        for done, (sample, image) in enumerate(zip(order, images, strict=True), start=1):
            writer.write(int(sample) // images_per_identity, image)
            if progress is not None and (done % 64 == 0 or done == total):
                progress(done, total)
    return PackSummary(Path(out), total, identities, writer.shards, writer.bytes)


def _render(sample: int, *, per_identity: int, height: int, width: int, quality: int, seed: int) -> bytes:
    identity, image = divmod(sample, per_identity)
    colours = np.random.default_rng((seed, identity)).integers(0, 256, (_GRID, _GRID, 3), dtype=np.uint8)
    margin_y, margin_x = height // 8, width // 8
    pattern = Image.fromarray(colours).resize((width + margin_x, height + margin_y), Image.Resampling.BICUBIC)

    random = np.random.default_rng((seed, identity, 1 + image))
    top, left = random.integers(0, (margin_y + 1, margin_x + 1))
    view = np.asarray(pattern.crop((left, top, left + width, top + height)), dtype=np.float32)
    noise = random.standard_normal((height, width, 1), dtype=np.float32) * _NOISE
    picture = view * random.uniform(0.7, 1.3) + noise
    return encode_image(Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)), quality=quality, encoding="jpeg")
