"""``pfc centers``: a run's centers, one an identity, and the images that are far from theirs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ...data.errors import UsageError
from ..console import find_device, progress_bar
from ..models import BatchSize, Device, Source, check_new_folder, embedded, new_folder, open_backbone


def centers(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="The packed data set; of several in one run, once for each, in their order. "
            "[dim]\\[default: the run's data.train][/dim]",
            show_default=False,
        ),
    ] = None,
    angle: Annotated[
        float, typer.Option(min=1, max=180, help="Degrees from which an image is likely another identity's.")
    ] = 75.0,
    device: Device = "auto",
    batch_size: BatchSize = 128,
) -> None:
    """Write a run's centers, and list the training images that are far from their identity's.

    OUT/centers.npy: float32 [C, D], of length 1; of several sub-centers the one that most images are nearest to.
    OUT/far.txt: the numbers of the images at more than --angle from it, one a line, counted from 0 as the data set has
    them; `pfc pack recordio SET NEW --without-images OUT/far.txt` leaves them out (of several sets, SET... in the same
    order). OUT/review.json: how many images are at their dominant center, how many centers have none, and the angles.
    Images that cannot be read are counted and named.
    """
    import numpy as np

    from ...data import JointDataset
    from ...engine import checkpoint
    from ...engine.config import load_config
    from ...engine.sub_centers import review, stored_centers, write_dominant
    from ...engine.training_data import remote_options

    check_new_folder(out)
    where = find_device(device)
    found = checkpoint.find(source)
    trained = open_backbone(source, where)
    config = load_config(found.path / checkpoint.CONFIG)
    paths = data or [one.path for one in config.data.sources]
    if not paths:
        raise UsageError(f"{source} was trained on generated images: give --data")
    dataset = JointDataset.open(paths, remote=remote_options(config))
    with new_folder(out) as partial:
        stored = stored_centers(found, partial)
        if len(stored) != dataset.num_classes:
            raise UsageError(
                f"{found.path} has {len(stored):,} identities, the data set "
                f"{dataset.num_classes:,}: give the data set that it was trained on, with --data"
            )
        with progress_bar("embedding") as progress:
            batches = embedded(trained, dataset, where, batch_size, progress)
            result = review(stored, (batch[:3] for batch in batches), len(dataset))
        with progress_bar("writing centers") as progress:
            write_dominant(stored, result.dominant, partial / "centers.npy", progress)
        del stored
        (partial / "all.npy").unlink()
        np.savetxt(partial / "far.txt", result.far(angle), fmt="%d")
        summary = result.summary(angle)
        (partial / "review.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    each = summary["sub_centers"]
    if each > 1:
        print(
            f"{each} centers each of {summary['identities']:,} identities: {summary['images_at_the_dominant']:,} of "
            f"{summary['images']:,} images are nearest to their identity's dominant one, "
            f"{summary['identities_in_several']:,} identities have a tenth or more elsewhere, "
            f"{summary['empty_sub_centers']:,} centers have none"
        )
    print(
        f"angle of an image to its center: median {summary['angle_median']:.1f}°; "
        f"{summary['images_beyond_angle']:,} of {summary['images']:,} images lie beyond {angle:g}°"
    )
    print(f"wrote centers.npy, far.txt and review.json: {out}")
