"""A data set whose pictures are computed when they are asked for: any number of identities, and no disk.

Every pixel is a function of (seed, identity, number of the picture), the same on every machine, in any batch and on
any rank: random bits come from ``counter_hash``, and sums are of whole numbers that float32 holds exactly.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from .loading.augment import draw_flips
from .loading.batches import Batch, Loader
from .loading.device import CPU, moved
from .order.orders import Integers, Order, SampleOrder, counter_hash

_IDENTITY, _PICTURE, _NOISE = 0, 1, 2  # streams of the hashes
_WAVES = 4  # that a pattern is the sum of
_COSINE = np.rint(127 * np.cos(2 * np.pi / 256 * np.arange(256))).astype(np.float32)  # of 256 steps of a turn
_CONTRAST = 50 / (127**2 * (_WAVES / 2) ** 0.5)  # with it a pattern's standard deviation is 50 of 255
_BRIGHTER, _NOISY = 30, 30  # the most that brightness and noise add to a pixel, or take from it
_AT_ONCE = 1 << 14  # pixels that are computed together: their numbers stay in a core's cache
_AHEAD = 2  # batches computed before they are asked for


class GeneratedDataset:
    """Pictures that are computed: ``images_per_identity`` of each identity that has any.

    An identity is a smooth pattern, the sum of a few random waves of low frequency. Each of its pictures shows it
    shifted by up to an eighth of the size, in another contrast and brightness, and noisy.

    Args:
        identities: C; labels are 0 … C − 1.
        images_per_identity: pictures of each active identity.
        image_size: (height, width).
        active: how many identities have pictures, spread evenly over the labels; all by default. The others are
            classes without pictures: negatives in the head.
        seed: of the pictures; another seed, other identities.

    Attributes: ``name``; ``num_classes``; ``active``; ``image_size``.
    """

    name = "generated"

    def __init__(
        self,
        identities: int,
        *,
        images_per_identity: int,
        image_size: tuple[int, int],
        active: int | None = None,
        seed: int = 0,
    ) -> None:
        self.num_classes, self.active = identities, active or identities
        self.image_size = image_size
        self._per_identity, self._seed = images_per_identity, seed

    def __len__(self) -> int:
        return self.active * self._per_identity

    def labels(self, samples: Integers) -> Integers:
        """Of ``samples``, int64 [b] in [0, len): int64 [b]."""
        return samples // self._per_identity * self.num_classes // self.active

    def numbers(self, samples: Integers) -> Integers:
        """Which picture of its identity each sample is: int64 [b] in [0, images_per_identity)."""
        return samples % self._per_identity

    def pictures(self, samples: Integers) -> NDArray[np.uint8]:
        """Of ``samples``, int64 [b] in [0, len): uint8 [b, H, W, 3], RGB."""
        height, width = self.image_size
        pixels = np.empty((len(samples), height, width, 3), dtype=np.uint8)
        step = max(1, _AT_ONCE // (height * width))
        for first in range(0, len(samples), step):
            pixels[first : first + step] = self._drawn(samples[first : first + step])
        return pixels

    def _drawn(self, samples: Integers) -> NDArray[np.float32]:
        """[b, H, W, 3], whole numbers from 0 to 255."""
        height, width = self.image_size
        identities, numbers = self.labels(samples)[:, None], self.numbers(samples)[:, None]
        waves = _parts(counter_hash(self._seed, _IDENTITY, identities, np.arange(_WAVES)), "<u1")  # [b, waves, 8]
        down, across = waves[..., 0] % 4, waves[..., 1] % 7 - 3  # turns over the picture; the other signs are the same
        view = _parts(counter_hash(self._seed, _PICTURE, identities, numbers), "<u2")[:, 0]  # [b, 4]
        y = np.arange(height) + view[:, :1] % (height // 8 + 1)
        x = np.arange(width) + view[:, 1:2] % (width // 8 + 1)
        rows = 256 * down[..., None] * y[:, None] // height  # [b, waves, H]
        columns = 256 * across[..., None] * x[:, None] // width  # [b, waves, W]
        columns = columns[..., None] + waves[:, :, None, 2:5]  # [b, waves, W, 3]: each colour at a phase of its own
        # cos(r + c) = cos r · cos c − sin r · sin c; all sums are below 2²⁴.
        left = np.concatenate([_COSINE[rows & 255], -_COSINE[rows - 64 & 255]], axis=1).swapaxes(1, 2)
        right = np.concatenate([_COSINE[columns & 255], _COSINE[columns - 64 & 255]], axis=1)
        pixels = left @ right.reshape(len(samples), 2 * _WAVES, 3 * width)
        contrast, brightness = (view[:, 2:].astype(np.float32) / 65535).T[..., None, None]  # [b, 1, 1] from 0 to 1
        pixels *= np.float32(_CONTRAST) * (np.float32(0.7) + np.float32(0.6) * contrast)
        pixels += np.float32(127.5) + np.float32(_BRIGHTER) * (2 * brightness - 1)
        size = 3 * height * width
        noise = counter_hash(self._seed, _NOISE, identities, numbers, np.arange(-(-size // 8)))
        noise = noise.astype("<u8").view(np.uint8)[:, :size].reshape(pixels.shape)
        pixels += (noise - np.float32(127.5)) * np.float32(_NOISY / 127.5)
        return np.rint(np.clip(pixels, 0, 255)).reshape(-1, height, width, 3)


def _parts(words: NDArray[np.uint64], kind: str) -> Integers:
    """The words of 64 bits cut into smaller ones: int64 [..., parts]."""
    return words[..., None].astype("<u8").view(kind).astype(np.int64)


class GeneratedLoader(Loader):
    """The batches of a generated data set, computed on the CPU by a thread of its own, some ahead.

    Args:
        dataset: what is shown.
        batch_size: b, images per rank and step.
        rank, world_size: which part of each global batch is this process's.
        seed: of the order (where none is given) and of the flips.
        order, drop, position: see ``Loader``; by default a permutation of the whole data set for every epoch.
        flip: mirror half of the images; which ones depends on (seed, epoch, sample).
        device: where the tensors lie.
    """

    def __init__(
        self,
        dataset: GeneratedDataset,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        order: Order | None = None,
        drop: bool = False,
        flip: bool = True,
        device: torch.device | None = None,
        position: int = 0,
    ) -> None:
        order = order or SampleOrder(len(dataset), seed)
        super().__init__(order, global_batch=batch_size * world_size, drop=drop, position=position)
        self._dataset, self._seed, self._flip = dataset, seed, flip
        self._mine = rank * batch_size + np.arange(batch_size)
        self._device = device or CPU
        self._thread = ThreadPoolExecutor(1, "pfc-pictures")
        self._asked_to = self.position
        self._asked: deque[tuple[int, Future[Batch]]] = deque()
        for _ in range(_AHEAD):
            self._ask()

    def __next__(self) -> Batch:
        self._ask()
        self.position, batch = self._asked.popleft()
        done = batch.result()
        return Batch(moved(done.images, self._device), moved(done.labels, self._device), done.samples)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _ask(self) -> None:
        start, self._asked_to = self._asked_to, self._batch_start(self._asked_to + self._global_batch)
        self._asked.append((self._asked_to, self._thread.submit(self._batch, start)))

    def _batch(self, start: int) -> Batch:
        positions = start + self._mine
        samples = self._order.at(positions)
        pixels = self._dataset.pictures(samples)
        if self._flip:
            mirrored = draw_flips(self._seed, self._order.visits(positions), samples) == 1
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return Batch(images.div_(127.5).sub_(1), torch.from_numpy(self._dataset.labels(samples)), samples)
