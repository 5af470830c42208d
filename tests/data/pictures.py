"""Small data sets of known pictures, and the global batches that loaders make of them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pfc.data.loading.loader import TrainLoader
from pfc.data.packing.writer import ShardedWriter
from pfc.data.records.dataset import RecordDataset

SIZE = (24, 20)


def encode(picture: np.ndarray, form: str = "PNG") -> bytes:
    """By default lossless: every pixel can be compared."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, form)
    return file.getvalue()


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """RGB noise of its own for every number."""
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    """What a loader should make of a picture: float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1


def pack(folder: Path, images: list[bytes], identities: int = 5, shards: int = 2) -> RecordDataset:
    with ShardedWriter(folder, identities=identities, image_size=SIZE, source="test", shards=shards) as writer:
        for number, image in enumerate(images):
            writer.write(number % identities, image)
    return RecordDataset.open(folder)


def stored(dataset: RecordDataset, sample: int) -> torch.Tensor:
    """The picture of a sample as Pillow decodes it, float32 [3, H, W]."""
    with Image.open(io.BytesIO(bytes(dataset.read(sample)[1]))) as image:
        return as_tensor(np.array(image))


def collect(dataset: Any, steps: int, batch_size: int, world_size: int = 1, **options: Any) -> tuple:
    """The global batches of ``steps`` steps, put together from every rank: images [n, 3, H, W] and labels [n]."""
    loaders = [
        TrainLoader(dataset, batch_size=batch_size, image_size=SIZE, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    batches = [next(loader) for _ in range(steps) for loader in loaders]
    for loader in loaders:
        loader.close()
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])
