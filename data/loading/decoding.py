"""Encoded images to normalised tensors for evaluation: in the given order, none left out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UndecodableImage
from .dali import PREFETCH, REFUSED, build_pipeline, run_pipeline, undecodable
from .device import CPU, moved
from .headers import header_problem, pillow_problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

Encoded = bytes | np.ndarray


def decode_images(
    images: Sequence[Encoded],
    *,
    image_size: tuple[int, int],
    batch_size: int,
    device: torch.device | None = None,
    threads: int = 2,
) -> Iterator[Tensor]:
    """Decode images for evaluation, in the given order and without augmentation.

    On the CPU, whatever the device: so figures do not depend on how a GPU's decoder rounds.

    Args:
        images: encoded images (JPEG, PNG, ...), as bytes or as uint8 arrays.
        image_size: (height, width); images of another size are scaled to cover it and cropped at the centre.
        batch_size: the most images a tensor holds; the last one may hold fewer.
        device: where the tensors lie; the CPU by default.
        threads: CPU threads that DALI may use.

    Yields:
        float32 [b, 3, H, W], RGB, in [-1, 1].

    Raises:
        UsageError: DALI is not installed.
        UndecodableImage: the first image that cannot be decoded, by its place in ``images``.
    """
    starts = range(0, len(images), batch_size)

    def slices() -> Iterator[list[Any]]:
        for start in starts:
            encoded = [np.frombuffer(image, dtype=np.uint8) for image in images[start : start + batch_size]]
            if any(header_problem(image) for image in encoded):
                raise RuntimeError("not to be given to DALI")  # what it would do to such an image: see headers
            held.append(encoded)
            yield [encoded, np.zeros(len(encoded), dtype=np.int32)]

    held: deque[list[NDArray[np.uint8]]] = deque(maxlen=2 * PREFETCH + 2)  # DALI reads them where they lie
    pipeline = build_pipeline(
        slices(), batch_size=batch_size, image_size=image_size, resize=True, device=CPU, threads=threads
    )
    for start in starts:
        try:
            tensor = run_pipeline(pipeline, CPU)
        except RuntimeError as error:
            under_way = images[start : start + (PREFETCH + 1) * batch_size]
            encoded = [np.frombuffer(image, dtype=np.uint8) for image in under_way]
            for place in undecodable(encoded, CPU):
                problem = header_problem(encoded[place]) or pillow_problem(encoded[place]) or REFUSED
                raise UndecodableImage(start + place, problem) from error
            raise
        yield moved(tensor, device or CPU)
