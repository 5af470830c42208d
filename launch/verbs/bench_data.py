"""``pfc bench data``: loading speed of a data set, compared with DALI's own reader and a torch DataLoader."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ...data.errors import UsageError
from ..console import print_table


def data(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="A packed data set: a folder, or one .rec.")],
    batch: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 128,
    threads: Annotated[int, typer.Option(min=1, help="Decoding threads.")] = 2,
    decode: Annotated[Literal["cpu", "gpu"], typer.Option(help="Where DALI decodes, as data.decode.")] = "cpu",
    batches: Annotated[int, typer.Option(min=1, help="Batches a turn.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every loader.")] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
) -> None:
    """Load images as training does, and nothing else: images per second in the global and the blocks order.

    For comparison, in the same run and taking turns, DALI's own reader of such files (shuffled within a window, and in
    the order of the files) and a plain torch DataLoader that decodes with Pillow; and the same files through the cache
    of remote data sets.
    """
    import statistics

    from ...benchmarks.data import measure_loaders
    from ...data import RecordDataset
    from ...data.remote.mirror import address_of
    from ...engine.device import local_device

    if (address := address_of(dataset)) is not None:
        raise UsageError(f"{address}: DALI's own reader takes local files alone: give a data set on a disk")
    opened = RecordDataset.open(dataset)
    if opened.image_size is None:
        raise UsageError(f"{dataset} does not say how large its images are: pack it with one size")
    if len(opened) < batch:
        raise UsageError(f"{dataset} holds {len(opened)} images, fewer than a batch of {batch}: take a smaller --batch")
    device = local_device()
    timings = measure_loaders(
        opened, batch_size=batch, threads=threads, batches=batches, rounds=rounds, device=device, place=decode
    )
    height, width = opened.image_size
    print(
        f"{len(opened):,} images of {height}×{width}, {threads} threads on {device.type}, "
        f"decoded on the {decode.upper()}, batches of {batch}, {rounds} turns of {batches} batches"
    )
    lines = [
        (
            timing.loader,
            f"{timing.median:,.0f}",
            f"{min(timing.images_per_second):,.0f}–{max(timing.images_per_second):,.0f}",
            f"{timing.ratio:.2f}",
            f"{statistics.median(busy):.0f} µs" if (busy := timing.processor_microseconds) else "",
        )
        for timing in timings
    ]
    print_table(("loader", "images/s", "spread", "× DALI's reader", "processor, an image"), lines)
    if json_file is not None:
        json_file.write_text(json.dumps([timing.to_dict() for timing in timings], indent=2), encoding="utf-8")
