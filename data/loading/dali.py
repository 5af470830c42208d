"""The DALI pipelines: from encoded images and drawn numbers to normalised tensors. Nothing else imports DALI."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UsageError
from .device import decoder_options, device_id, output_stream, owned, takes_rows
from .headers import header_problem
from .plain import PlainImages

_IMPORTING = threading.Lock()
PREFETCH = 2
"""Batches that DALI prepares ahead of the one that is asked for."""

REFUSED = "DALI refuses it"
"""What is wrong with an image that Pillow decodes and DALI does not."""

Source = Iterable[list[Any]] | Callable[[], list[Any]]
"""For each batch: the encoded images, uint8 [bytes] each; the flips, int32 [b]; then what was drawn, [b, ...] each."""


def build_pipeline(
    source: Source,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    resize: bool,
    device: torch.device,
    threads: int,
    drawn: Sequence[str] = (),
) -> Any:
    """The pipeline from ``source`` to float32 [b, 3, H, W] in [-1, 1].

    Args:
        batch_size: the most images a batch holds.
        image_size: (height, width) of the result.
        resize: whether images may have another size: they are then scaled to cover it and cropped at the centre.
        device: where DALI works and the tensors lie.
        threads: CPU threads.
        drawn: names of what the source draws for augmentations, as ``Augment.draw`` names them.
    """
    fn, types, pipeline_def = import_dali()
    decoding = decoder_options(device)
    height, width = image_size
    active = [name for name in drawn if name in _CHANGES]

    # Augmentations are conditional operators: DALI splits the batch, applies them to the pictures that they were drawn
    # for and puts the batch together again. So the others stay as they are, to the bit, and cost nothing.
    @pipeline_def(enable_conditionals=bool(drawn))
    def pictures() -> Any:
        encoded, flips, *values = fn.external_source(
            source=source, num_outputs=2 + len(drawn), batch=True, no_copy=True
        )
        given = {name: values[place] for place, name in enumerate(drawn)}
        images = fn.decoders.image(encoded, output_type=types.RGB, **decoding)
        if "crop" in given:
            if given["crop"]:
                start, end = given["crop_start"], given["crop_end"]
                if resize:
                    start, end = _within_cover(images, start, end, fn, types, height, width)
                images = fn.resize(
                    images,
                    roi_start=start,
                    roi_end=end,
                    roi_relative=True,
                    resize_x=width,
                    resize_y=height,
                )
            elif resize:
                images = _fitted(images, fn, height, width)
        elif resize:
            images = _fitted(images, fn, height, width)
        for name in active:
            if given[name]:
                images = _CHANGES[name](images, given, fn, types, height, width)
        return fn.crop_mirror_normalize(
            images,
            crop=(height, width),
            mirror=flips,
            mean=[127.5] * 3,
            std=[127.5] * 3,
            dtype=types.FLOAT,
            output_layout="CHW",
        )

    # exec_dynamic: the outputs are the caller's for as long as it holds them, and can be asked for on a stream.
    pipeline = pictures(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id(device),
        prefetch_queue_depth=PREFETCH,
        exec_dynamic=True,
    )
    pipeline.build()
    return pipeline


def _fitted(images: Any, fn: Any, height: int, width: int) -> Any:
    """Scaled to cover the size, keeping the proportions, and cropped at the centre."""
    return fn.crop(fn.resize(images, resize_x=width, resize_y=height, mode="not_smaller"), crop=(height, width))


def _within_cover(images: Any, start: Any, end: Any, fn: Any, types: Any, height: int, width: int) -> Any:
    """The corners of a part of what ``_fitted`` shows, as corners in the whole pictures; all are shares of the sides.

    Otherwise a picture of other proportions than height by width would be squeezed.
    """
    from nvidia.dali import math

    sides = images.shape(dtype=types.FLOAT)[:2] / types.Constant([height, width], dtype=types.FLOAT)
    shown = math.min(sides[0], sides[1]) / sides  # exactly 1 where the proportions are the same
    return [(1 - shown) / 2 + shown * corner for corner in (start, end)]


def _colour(images: Any, given: dict[str, Any], fn: Any, types: Any, height: int, width: int) -> Any:
    return fn.color_twist(
        images,
        brightness=given["colour_brightness"],
        contrast=given["colour_contrast"],
        saturation=given["colour_saturation"],
        hue=given["colour_hue"],
    )


def _gray(images: Any, given: dict[str, Any], fn: Any, types: Any, height: int, width: int) -> Any:
    gray = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
    return fn.color_space_conversion(gray, image_type=types.GRAY, output_type=types.RGB)


def _low_resolution(images: Any, given: dict[str, Any], fn: Any, types: Any, height: int, width: int) -> Any:
    scale = given["low_resolution_scale"]
    small = fn.resize(images, resize_x=scale * width, resize_y=scale * height)
    return fn.resize(small, resize_x=width, resize_y=height)


def _blur(images: Any, given: dict[str, Any], fn: Any, types: Any, height: int, width: int) -> Any:
    return fn.gaussian_blur(images, sigma=given["blur_sigma"])


def _jpeg(images: Any, given: dict[str, Any], fn: Any, types: Any, height: int, width: int) -> Any:
    return fn.jpeg_compression_distortion(images, quality=given["jpeg_quality"])


def _cutout(images: Any, given: dict[str, Any], fn: Any, types: Any, height: int, width: int) -> Any:
    anchor, shape = given["cutout_anchor"], given["cutout_shape"]
    return fn.erase(images, anchor=anchor, shape=shape, normalized=True, axis_names="HW", fill_value=_GRAY)


_GRAY = 128  # nearly 0 when normalised
_CHANGES = {
    "colour": _colour,
    "gray": _gray,
    "low_resolution": _low_resolution,
    "blur": _blur,
    "jpeg": _jpeg,
    "cutout": _cutout,
}


def as_batch(images: Sequence[NDArray[np.uint8]], device: torch.device) -> Any:
    """Encoded images as DALI holds a batch of them, copied into one piece: faster than what it would make of a list."""
    from nvidia.dali.tensors import TensorCPU, TensorListCPU

    # One object in place of one an image.
    rows = images.rows() if takes_rows(device) and isinstance(images, PlainImages) else None
    if rows is not None:
        return TensorListCPU(rows, "")
    return TensorListCPU([TensorCPU(image, "") for image in images], "")


def as_numbers(drawn: np.ndarray) -> Any:
    """Numbers of a batch, [b, ...], as DALI holds them."""
    from nvidia.dali.tensors import TensorListCPU

    return TensorListCPU(np.ascontiguousarray(drawn), "")


def run_pipeline(pipeline: Any, device: torch.device) -> Tensor:
    """The next batch as a tensor of the caller's own. RuntimeError if DALI fails: the pipeline is then unusable."""
    (images,) = pipeline.run(output_stream(device))  # by place: a name would be one of the pipeline's inputs
    return owned(torch.from_dlpack(images.as_tensor()), device)


def undecodable(images: Sequence[NDArray[np.uint8]], device: torch.device) -> list[int]:
    """The places of those images that DALI cannot decode, each of them tried alone (and some not tried at all, see
    ``headers``)."""
    fn, types, pipeline_def = import_dali()
    decoding = decoder_options(device)
    bad = [place for place, image in enumerate(images) if header_problem(image)]
    good = [place for place in range(len(images)) if place not in bad]
    rest = iter(range(0))

    @pipeline_def(batch_size=1, num_threads=1, exec_pipelined=False, exec_async=False, prefetch_queue_depth=1)
    def alone() -> Any:
        encoded = fn.external_source(source=lambda: [images[next(rest)]], batch=True)
        return fn.decoders.image(encoded, output_type=types.RGB, **decoding)

    at = 0
    while at < len(good):
        rest = iter(good[at:])
        pipeline = alone(device_id=device_id(device))
        pipeline.build()
        try:
            while at < len(good):
                pipeline.run()
                at += 1
        except RuntimeError:
            bad.append(good[at])
            at += 1
    return sorted(bad)


def import_dali() -> tuple[Any, Any, Any]:
    """DALI's fn, types and pipeline_def: imported when they are needed, because the rest of pfc works without them."""
    try:
        # Otherwise every batch is newly allocated and its pages zeroed by the system: a tenth of the time on a CPU.
        os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "64k")
        with _IMPORTING:  # its modules import each other in a circle: two threads at it at once block each other
            from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise UsageError(f"NVIDIA DALI, which decodes images, is not installed: {how_to_install()}") from error
    return fn, types, pipeline_def


def how_to_install() -> str:
    """The command that installs the DALI whose CUDA is this PyTorch's; without a GPU either of them decodes."""
    return f"pip install 'pfc[{'cuda12' if (torch.version.cuda or '').startswith('12') else 'cuda13'}]'"
