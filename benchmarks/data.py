"""Images per second of loading alone: pfc's pipeline compared with DALI's own reader and a plain torch DataLoader.

All loaders decode the same images on the same number of threads into float32 [b, 3, H, W] in [-1, 1], half of them
mirrored. "Cached" reads the set as a remote one, from the blocks in its cache. They take turns, a few batches each, so
that drifts of the machine's speed affect all of them alike; ratios are of the same turn.
"""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import RecordDataset, RemoteOptions, TrainLoader
from ..data.checking.merged_index import write_merged_index
from ..data.loading.dali import PREFETCH, import_dali, run_pipeline
from ..data.loading.device import Place, decoder_options, decoding_device, device_id, moved, wait_for
from ..data.order.orders import BlockOrder

_BLOCK, _WINDOW = 1024, 8192
BASELINE = "DALI's reader, shuffled"
PEER = "torch DataLoader, Pillow"
_IDLE = 1.0
"""Seconds after the DataLoader's turn, for its processes to finish what they prefetch and become idle."""


@dataclass(frozen=True)
class LoaderTiming:
    """One line, of every turn; and the median ratio to the speed of DALI's shuffled reader in the same turn."""

    loader: str
    images_per_second: list[float]
    processor_microseconds: list[float] | None
    """Of all cores together, an image; None for a loader with processes of its own."""
    ratio: float

    @property
    def median(self) -> float:
        return statistics.median(self.images_per_second)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "median": self.median}


def measure_loaders(
    dataset: RecordDataset,
    *,
    batch_size: int,
    threads: int,
    batches: int,
    rounds: int,
    device: torch.device,
    place: Place = "cpu",
    tell: Callable[[str], None] = lambda line: None,
) -> list[LoaderTiming]:
    """Times every loader over ``rounds`` turns of ``batches`` batches, after one turn untimed.

    Args:
        dataset: its image size is that of the tensors.
        threads: decoding threads of DALI; worker processes of the DataLoader.
        device: where the tensors end.
        place: where DALI decodes, as ``data.decode`` says.
        tell: called with a line that says what is measured.
    """
    size = dataset.image_size
    assert size is not None
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "merged.idx"
        recs = write_merged_index(dataset, index)
        ours: dict[str, Any] = {
            "batch_size": batch_size,
            "image_size": size,
            "device": device,
            "decode": place,
            "threads": threads,
        }
        blocks = BlockOrder(len(dataset), 0, block_size=_BLOCK, window=_WINDOW)
        loaders: dict[str, Iterator[Any]] = {
            BASELINE: _dali_reader(recs, index, ours, shuffle=True),
            "DALI's reader, in file order": _dali_reader(recs, index, ours, shuffle=False),
            "pfc, global order": TrainLoader(dataset, **ours),
            "pfc, blocks order": TrainLoader(dataset, order=blocks, **ours),
        }
        if importlib.util.find_spec("fsspec") is not None:
            cached = RecordDataset.open(f"file://{dataset.path.resolve()}", remote=RemoteOptions(f"{folder}/cache"))
            loaders["pfc, blocks order, cached"] = TrainLoader(cached, order=blocks, **ours)
        loaders[PEER] = _torch_loader(dataset, batch_size, threads, device)
        speeds: dict[str, list[float]] = {name: [] for name in loaders}
        busy: dict[str, list[float]] = {name: [] for name in loaders}
        for turn in range(rounds + 1):
            names = list(loaders)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # none is always first
                loader = loaders[name]
                tell(f"turn {turn} of {rounds}: {name}")
                # What a loader prepared while it was not its turn does not count.
                for _ in range(PREFETCH + 1):
                    next(loader)
                wait_for(device)
                begin, begin_busy = time.perf_counter(), time.process_time()
                for _ in range(batches):
                    next(loader)
                wait_for(device)
                seconds, busy_seconds = time.perf_counter() - begin, time.process_time() - begin_busy
                if name == PEER:
                    time.sleep(_IDLE)
                if turn:
                    speeds[name].append(batch_size * batches / seconds)
                    busy[name].append(busy_seconds / batch_size / batches * 1e6)
        for loader in loaders.values():
            if isinstance(loader, TrainLoader):
                loader.close()
    return [
        LoaderTiming(
            name,
            seen,
            None if name == PEER else busy[name],
            statistics.median(own / base for own, base in zip(seen, speeds[BASELINE], strict=True)),
        )
        for name, seen in speeds.items()
    ]


def _dali_reader(recs: list[Path], index: Path, options: dict[str, Any], *, shuffle: bool) -> Iterator[Tensor]:
    """DALI's ``fn.readers.mxnet`` over the merged index, and the same operators behind it as pfc's."""
    fn, types, pipeline_def = import_dali()
    decoder = decoding_device(options["decode"], options["device"])
    decoding = decoder_options(decoder)

    @pipeline_def(
        batch_size=options["batch_size"],
        num_threads=options["threads"],
        device_id=device_id(decoder),
        prefetch_queue_depth=PREFETCH,
        exec_dynamic=True,
    )
    def pictures() -> Any:
        encoded, _ = fn.readers.mxnet(
            path=[str(rec) for rec in recs], index_path=[str(index)], random_shuffle=shuffle, initial_fill=_WINDOW
        )
        return fn.crop_mirror_normalize(
            fn.decoders.image(encoded, output_type=types.RGB, **decoding),
            crop=options["image_size"],
            mirror=fn.random.coin_flip(),
            mean=[127.5] * 3,
            std=[127.5] * 3,
            dtype=types.FLOAT,
            output_layout="CHW",
        )

    pipeline = pictures()
    pipeline.build()
    while True:
        yield moved(run_pipeline(pipeline, decoder), options["device"])


class _Pictures(torch.utils.data.Dataset):
    """Pillow, one image at a time."""

    def __init__(self, path: Path, length: int) -> None:
        self.path = path
        self.length = length
        self.dataset: RecordDataset | None = None  # each worker process opens its own

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import io

        import numpy as np
        from PIL import Image

        if self.dataset is None:
            self.dataset = RecordDataset.open(self.path)
        label, encoded = self.dataset.read(index)
        picture = np.asarray(Image.open(io.BytesIO(encoded.data)).convert("RGB"))
        image = torch.from_numpy(picture.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)
        return image.flip(2) if torch.rand(()) < 0.5 else image, label


def _torch_loader(dataset: RecordDataset, batch_size: int, threads: int, device: torch.device) -> Iterator[Tensor]:
    loader = torch.utils.data.DataLoader(
        _Pictures(dataset.path, len(dataset)),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=threads,
        multiprocessing_context="spawn",
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    while True:
        for images, _ in loader:
            yield images.to(device, non_blocking=True)
