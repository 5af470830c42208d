"""From encoded images to normalised tensors, decoded and augmented by NVIDIA DALI on the CPU or the GPU.

pfc decides which sample comes when and how it is augmented, and hands DALI the bytes and the random
numbers. So what a step sees depends on (seed, position) alone: not on the number of ranks, on prefetching
or on restarts.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError
from .order import SampleOrder, counter_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .dataset import RecordDataset

_PREFETCH = 2
_FLIP_STREAM = 1  # keeps the flips independent of any other random numbers drawn from the same seed

Encoded = bytes | np.ndarray


@dataclass
class Batch:
    """One rank's part of a global batch; the tensors belong to whoever receives it.

    Attributes:
        images: float32 [b, 3, H, W], RGB, each value in [-1, 1], on the loader's device.
        labels: int64 [b], on the loader's device.
    """

    images: Tensor
    labels: Tensor


@dataclass
class _Pending:
    """What was handed to DALI and has not come back yet."""

    samples: NDArray[np.int64]
    labels: NDArray[np.int64]


class TrainLoader:
    """Endless iterator over one rank's slices of the global batches.

    With b = ``batch_size`` and B = b · ``world_size``, a step takes the next B positions of the sample
    order and rank r gets the r-th b of them. Epochs follow each other without a gap, so a batch may hold
    the end of one and the beginning of the next, and every rank takes the same number of steps.

    Args:
        dataset: images and labels; must stay open while the loader is used.
        batch_size: b, images per rank and step.
        image_size: (height, width) of the tensors; stored images of another size are scaled, keeping their
            proportions, to cover it and cropped at the centre.
        rank, world_size: which part of each global batch is this process's.
        seed: of the sample order and of the flips.
        flip: mirror half of the images; which ones depends on (seed, epoch, sample).
        device: where decoding ends and the tensors lie.
        threads: CPU threads that DALI may use.
        position: global samples consumed before this loader starts; 0 for a new run.

    Raises:
        UsageError: DALI is not installed; the data set holds no image; a record is damaged or its label is outside
            [0, num_classes).
        RuntimeError: an image cannot be decoded; names the data set and, where it can be found, the image.
    """

    def __init__(
        self,
        dataset: RecordDataset,
        *,
        batch_size: int,
        image_size: tuple[int, int],
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        flip: bool = True,
        device: torch.device | None = None,
        threads: int = 2,
        position: int = 0,
    ) -> None:
        if len(dataset) == 0:
            raise UsageError(f"data set {dataset.name!r} holds no image: pack it again from a folder with images")
        self.position = position
        self._dataset = dataset
        self._batch_size = batch_size
        self._world_size = world_size
        self._seed = seed
        self._flip = flip
        self._device = device or torch.device("cpu")
        self._image_size = image_size
        self._order = SampleOrder(len(dataset), seed)
        self._next_position = position + rank * batch_size  # where this rank's next slice to be read begins
        self._pending: deque[_Pending] = deque()
        self._pipeline: Any = _build_pipeline(
            self._read_slice,
            batch_size=batch_size,
            image_size=image_size,
            resize=dataset.image_size != image_size,
            device=self._device,
            threads=threads,
        )

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        if self._pipeline is None:
            raise RuntimeError("this TrainLoader is closed: make a new one at its position to go on")
        try:
            images = _run(self._pipeline, self._device)
        except RuntimeError as error:
            self.close()
            self._explain(error)
        labels = torch.from_numpy(self._pending.popleft().labels)
        if self._device.type == "cuda":
            labels = labels.pin_memory().to(self._device, non_blocking=True)
        self.position += self._batch_size * self._world_size
        return Batch(images, labels)

    def close(self) -> None:
        """Free DALI's threads and buffers; batches already handed out stay valid."""
        self._pipeline = None

    def _read_slice(self) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.int32]]]:
        """The next encoded images and their flips; DALI asks ahead of what ``__next__`` returns."""
        positions = self._next_position + np.arange(self._batch_size, dtype=np.int64)
        self._next_position += self._batch_size * self._world_size
        samples = self._order.at(positions)
        labels = np.empty(len(samples), dtype=np.int64)
        images = []
        for place, sample in enumerate(samples.tolist()):
            labels[place], image = self._dataset.read(sample)
            images.append(image)
        self._pending.append(_Pending(samples, labels))
        flips = np.zeros(len(samples), dtype=np.int32)
        if self._flip:
            bits = counter_hash(self._seed, _FLIP_STREAM, self._order.epoch(positions), samples)
            flips = (bits >> np.uint64(63)).astype(np.int32)
        return images, [np.asarray(flip) for flip in flips]

    def _explain(self, error: RuntimeError) -> NoReturn:
        """DALI does not say which image broke a batch: find it among the images that were under way."""
        for batch in self._pending:
            for sample in batch.samples.tolist():
                problem = _decoding_problem(self._dataset.read(sample)[1])
                if problem:
                    shard, position = self._dataset.locate(sample)
                    where = shard.error(position, f"image {sample} cannot be decoded ({problem})")
                    raise RuntimeError(
                        f"data set {self._dataset.name!r}: {where}; `pfc inspect` lists every image that is damaged"
                    ) from error
        raise RuntimeError(f"data set {self._dataset.name!r}: DALI could not make a batch: {error}") from error


def decode_images(
    images: Sequence[Encoded],
    *,
    image_size: tuple[int, int],
    batch_size: int,
    device: torch.device | None = None,
    threads: int = 2,
) -> Iterator[Tensor]:
    """Decode images for evaluation, in the given order and without augmentation.

    Args:
        images: encoded images (JPEG, PNG, ...), as bytes or as uint8 arrays.
        image_size: (height, width); images of another size are scaled to cover it and cropped at the centre.
        batch_size: the most images a tensor holds; the last one may hold fewer.
        device: where decoding ends and the tensors lie; the CPU by default.
        threads: CPU threads that DALI may use.

    Yields:
        float32 [b, 3, H, W], RGB, in [-1, 1].

    Raises:
        UsageError: DALI is not installed.
        RuntimeError: an image cannot be decoded; names its place in ``images``.
    """
    device = device or torch.device("cpu")
    starts = range(0, len(images), batch_size)

    def slices() -> Iterator[tuple[list[NDArray[np.uint8]], list[NDArray[np.int32]]]]:
        for start in starts:
            encoded = [np.frombuffer(image, dtype=np.uint8) for image in images[start : start + batch_size]]
            yield encoded, [np.zeros((), dtype=np.int32)] * len(encoded)

    pipeline = _build_pipeline(
        slices(), batch_size=batch_size, image_size=image_size, resize=True, device=device, threads=threads
    )
    for start in starts:
        try:
            yield _run(pipeline, device)
        except RuntimeError as error:
            ahead = min(len(images), start + (_PREFETCH + 1) * batch_size)
            for place in range(start, ahead):
                problem = _decoding_problem(images[place])
                if problem:
                    raise RuntimeError(f"image {place} cannot be decoded ({problem})") from error
            raise


def _build_pipeline(
    source: Callable[[], Any] | Iterable[Any],
    *,
    batch_size: int,
    image_size: tuple[int, int],
    resize: bool,
    device: torch.device,
    threads: int,
) -> Any:
    """The DALI pipeline: (encoded images, flips) from ``source`` to float32 [b, 3, H, W] in [-1, 1]."""
    Pipeline, fn, types = _import_dali()
    on_gpu = device.type == "cuda"
    device_id = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
    height, width = image_size
    pipeline = Pipeline(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=_PREFETCH)
    with pipeline:
        encoded, flips = fn.external_source(source=source, num_outputs=2, batch=True)
        images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        if resize:
            images = fn.resize(images, resize_x=width, resize_y=height, mode="not_smaller")
        images = fn.crop_mirror_normalize(
            images,
            crop=(height, width),
            mirror=flips,
            mean=[127.5] * 3,
            std=[127.5] * 3,
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _import_dali() -> tuple[Any, Any, Any]:
    """DALI's Pipeline, fn and types: imported here alone, because the rest of pfc works without it."""
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise UsageError(
            "NVIDIA DALI is not installed: `pip install nvidia-dali-cuda130` "
            "(or nvidia-dali-cuda120 for CUDA 12); it decodes on machines without a GPU too"
        ) from error
    return Pipeline, fn, types


def _run(pipeline: Any, device: torch.device) -> Tensor:
    """The next batch as a tensor of the caller's own."""
    if device.type != "cuda":
        (images,) = pipeline.run()
        return torch.from_dlpack(images.as_tensor())  # keeps DALI's buffer alive; the next run uses another one
    stream = torch.cuda.current_stream(device)
    (images,) = pipeline.run(cuda_stream=stream)
    # A copy, because DALI's allocator does not know which torch streams still read its memory.
    return torch.from_dlpack(images.as_tensor()).clone()


def _decoding_problem(image: Encoded) -> str | None:
    """What is wrong with an encoded image, or None where Pillow can decode it."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(bytes(image))) as picture:
            picture.load()
    except Exception as error:  # a damaged file can raise nearly anything from within a decoder
        return str(error) or type(error).__name__
    return None
