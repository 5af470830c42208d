"""From encoded images to normalised tensors, decoded and augmented by NVIDIA DALI on the CPU or the GPU.

pfc decides which sample comes when and how it is augmented, and hands DALI the bytes and the random
numbers. So what a step sees depends on (seed, position) alone: not on the number of ranks, on prefetching
or on restarts.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import DamagedRecord, UsageError
from ..order.orders import Order, SampleOrder
from .augment import Augment, draw_flips
from .batches import Batch, Loader
from .dali import PREFETCH, REFUSED, as_batch, as_numbers, build_pipeline, run_pipeline, undecodable
from .damage import DamageLimit
from .device import CPU, Place, decoding_device, moved
from .headers import pillow_problem
from .readahead import ReadAhead
from .reader import Slice, SliceReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .reader import Dataset

_READ = 512  # samples that are read at once


class TrainLoader(Loader):
    """The batches of images that are stored, with b = ``batch_size`` and B = b · ``world_size``.

    A damaged sample (a record that cannot be read, a label out of range, an image without bytes or that DALI cannot
    decode) is replaced by a good one, the same at any world size and after a restart.

    Args:
        dataset: images and labels; must stay open while the loader is used.
        batch_size: b, images per rank and step.
        image_size: (height, width) of the tensors; stored images of another size are scaled, keeping their
            proportions, to cover it and cropped at the centre.
        rank, world_size: which part of each global batch is this process's.
        seed: of the order (where none is given), of the flips and of the augmentations.
        order: of the samples; by default a permutation of the whole data set for every epoch.
        drop: leave out the rest of each epoch that does not fill a global batch.
        flip: mirror half of the images; which ones depends on (seed, epoch, sample).
        augment: what else is done to the pictures; nothing by default.
        max_damaged: share of damaged images that is borne, see ``DamageLimit``.
        device: where the tensors lie.
        decode: where the pictures are decoded and augmented, "cpu" or "gpu" (``device`` then); from the CPU, the
            finished batch is copied to ``device``.
        threads: CPU threads that DALI may use.
        position: global samples consumed before this loader starts; 0 for a new run.

    Attributes:
        position: where the next global batch begins.

    Raises:
        UsageError: DALI is not installed; there is no GPU to decode on; the data set holds no image, or with ``drop``
            fewer than a global batch; too many images are damaged.
        RuntimeError: DALI fails without any image being to blame.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        image_size: tuple[int, int],
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        order: Order | None = None,
        drop: bool = False,
        flip: bool = True,
        augment: Augment | None = None,
        max_damaged: float = 0.02,
        device: torch.device | None = None,
        decode: Place = "cpu",
        threads: int = 2,
        position: int = 0,
    ) -> None:
        if len(dataset) == 0:
            raise UsageError(f"data set {dataset.name!r} holds no image: pack it again from a folder with images")
        super().__init__(
            order or SampleOrder(len(dataset), seed),
            global_batch=batch_size * world_size,
            drop=drop,
            position=position,
        )
        self._dataset = dataset
        self._seed = seed
        self._flip = flip
        self._augment = augment or Augment()
        self._device = device or CPU
        self._decoder = decoding_device(decode, self._device)
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "image_size": image_size,
            "resize": dataset.image_size != image_size,
            "device": self._decoder,
            "threads": threads,
            "drawn": self._augment.drawn,
        }
        self._reader = SliceReader(
            dataset,
            self._order,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            drop=drop,
            position=self.position,
            image_size=None if self._options["resize"] else image_size,
        )
        self._limit = DamageLimit(max_damaged, dataset.name)
        self._replaced = 0
        self._untold: dict[int, DamagedRecord] = {}
        self._told: set[int] = set()
        self._ahead = ReadAhead(dataset, self._order)
        self._pending: deque[Slice] = deque()  # handed to DALI, and not come back yet
        # DALI reads what it is given where it lies; a GPU may still be at it when its batch has come back.
        self._held: deque[list[Any]] = deque(maxlen=2 * PREFETCH + 2)
        self._ready: deque[tuple[Slice, list[Any]]] = deque()  # read, and not yet handed to DALI
        self._pipeline: Any = build_pipeline(self._next_slice, **self._options)
        # Slices are read by a thread of their own, ahead of DALI, while this one waits for DALI or trains.
        self._thread = ThreadPoolExecutor(1, "pfc-reader")
        self._reading = self._thread.submit(self._read_slices)

    def __next__(self) -> Batch:
        if self._pipeline is None:
            raise RuntimeError("this TrainLoader is closed: make a new one at its position to go on")
        while True:
            try:
                images = run_pipeline(self._pipeline, self._decoder)
                break
            except _OtherSizeError:
                self._options["resize"] = True
                self._begin_again()
            except RuntimeError as error:
                self._leave_out_undecodable(error)
            except UsageError:
                self.close()
                raise
        slice = self._pending.popleft()
        self._replaced += len(slice.damaged)
        self._untold.update((sample, record) for sample, record in slice.damaged if sample not in self._told)
        self._limit.count(len(slice.labels), [record for _, record in slice.damaged])
        self.position = slice.end
        labels = torch.from_numpy(slice.labels)
        return Batch(moved(images, self._device), moved(labels, self._device), slice.samples)

    def take_damage(self) -> tuple[int, dict[int, DamagedRecord]]:
        replaced, met = self._replaced, self._untold
        self._told.update(met)
        self._replaced, self._untold = 0, {}
        return replaced, met

    def close(self) -> None:
        self._pipeline = None
        self._thread.shutdown(cancel_futures=True)
        self._ahead.close()

    def _next_slice(self) -> list[Any]:
        """What DALI asks for, ahead of what ``__next__`` returns: encoded images, flips, drawn numbers."""
        if not self._ready:
            self._ready.extend(self._reading.result())
            self._reading = self._thread.submit(self._read_slices)
        slice, given = self._ready.popleft()
        self._pending.append(slice)
        if not (slice.fits or self._options["resize"]):
            raise _OtherSizeError
        self._held.append(given)
        return given

    def _read_slices(self) -> list[tuple[Slice, list[Any]]]:
        """Some slices at once: what calling numpy and waking this thread cost is then small for each."""
        self._ahead.move(self._reader.reads_from)
        size = self._options["batch_size"]
        slices = [self._reader.read() for _ in range(max(1, _READ // size))]
        visits = np.concatenate([slice.visits for slice in slices])
        samples = np.concatenate([slice.samples for slice in slices])
        flips = draw_flips(self._seed, visits, samples) if self._flip else np.zeros(len(samples), dtype=np.int32)
        drawn = [flips, *self._augment.draw(self._seed, visits, samples).values()]
        return [
            (slice, [as_batch(slice.images, self._decoder), *(as_numbers(values[at : at + size]) for values in drawn)])
            for at, slice in zip(range(0, len(samples), size), slices, strict=True)
        ]

    def _leave_out_undecodable(self, error: RuntimeError) -> None:
        """DALI does not say which image broke a batch: find it among those under way, and begin again without it."""
        wait([self._reading])
        for slice in self._pending:
            bad = undecodable(slice.images, self._decoder)
            for place in bad:
                self._mark(int(slice.samples[place]), slice.images[place])
            if bad:
                # Else each one that is no better would cost a round of its own.
                for sample, image in self._reader.substitutes(slice, bad[0]):
                    if not undecodable([image], self._decoder):
                        break
                    self._mark(sample, image)
                self._begin_again()
                return
        self.close()
        raise RuntimeError(f"data set {self._dataset.name!r}: DALI could not make a batch: {error}") from error

    def _mark(self, sample: int, image: NDArray[np.uint8]) -> None:
        self._reader.mark(sample, pillow_problem(image) or REFUSED)

    def _begin_again(self) -> None:
        """A new pipeline, from the first batch on that has not come back from the old one."""
        wait([self._reading])
        self._pipeline = None  # before what it may still be reading goes
        self._reader.rewind(self._pending[0].start)
        self._pending.clear()
        self._ready.clear()
        self._reading = self._thread.submit(self._read_slices)
        self._pipeline = build_pipeline(self._next_slice, **self._options)


class _OtherSizeError(Exception):
    """An image is not of the data set's size, and the pipeline was made for that size alone."""
