"""``pfc overlap``: what a training set and a test set share."""

from pathlib import Path
from typing import Annotated

import typer

from ...data.tables import write_csv
from ..console import find_device, progress_bar
from ..models import BatchSize, Device, NewFolder, Run, check_new_folder, new_folder, open_backbone, stored_embeddings
from ..review import Names, PairImages, side_by_side, write_lines

_SHOWN = 60  # pairs in the report, of identities and of images
_RARE = 0.01  # share of TRAIN's identities that may reach the threshold with another of TRAIN


def overlap(
    train: Annotated[Path, typer.Argument(metavar="TRAIN", help="The packed data set to train on.")],
    test: Annotated[Path, typer.Argument(metavar="TEST", help="A packed data set, or a verification set FILE.bin.")],
    out: NewFolder,
    run: Run,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="Cosine from which two identities are likely one. [dim]\\[default: what 1 % of TRAIN's identities "
            "reach with another of TRAIN][/dim]",
            show_default=False,
        ),
    ] = None,
    duplicate: Annotated[
        float, typer.Option(min=-1, max=1, help="Cosine from which two images are near duplicates.")
    ] = 0.95,
    device: Device = "auto",
    batch_size: BatchSize = 128,
) -> None:
    """Find the identities and the images that a training set shares with a test set; nothing is changed.

    OUT/overlap.csv: every identity of TRAIN with the nearest of TEST, the cosine of their means and the two images that
    are most alike; and those of one name. OUT/duplicates.csv: images of TRAIN that are images of TEST, by their bytes
    or nearly. OUT/without.txt and OUT/without_images.txt: what `pfc pack recordio TRAIN NEW` leaves out with
    `--without` and `--without-images`. OUT/report.html: the most alike side by side. Of a verification set every image
    is an identity of its own.
    """
    from ...data import RecordDataset, read_pairs
    from ...engine.report.pictures import PairGroup, PairPicture
    from ...engine.report.write import Tile, write_review
    from ...engine.review.embedded import halves
    from ...engine.review.overlap import Duplicate, Shared, between, duplicates, shared_identities

    check_new_folder(out)
    where = find_device(device)
    ours = RecordDataset.open(train)
    theirs = PairImages(read_pairs(test).images) if test.suffix == ".bin" else RecordDataset.open(test)
    our_names, their_names = Names(ours), Names(theirs)
    trained = open_backbone(run, where)
    with (
        new_folder(out) as partial,
        stored_embeddings(trained, ours, where, batch_size, partial / "train.npy") as left,
        stored_embeddings(trained, theirs, where, batch_size, partial / "test.npy") as right,
    ):

        def names(pair: Shared) -> tuple[str, str]:
            return our_names[left.labels[pair.train]], their_names[right.labels[pair.test]]

        def numbers(pair: Shared | Duplicate) -> tuple[int, int]:
            return int(left.numbers[pair.train_row]), int(right.numbers[pair.test_row])

        chosen = between(left, 1 - _RARE, device=where) if threshold is None else threshold
        named = our_names.shared(their_names)
        with progress_bar("comparing identities") as progress:
            pairs = shared_identities(left, right, named, device=where, progress=progress)
        copies = duplicates(left, right, duplicate, device=where)
        alike = [pair for pair in pairs if pair.cosine >= chosen]
        without = sorted({left.labels[pair.train] for pair in alike})
        own = halves(left)

        write_csv(
            partial / "overlap.csv",
            ("train_identity", "test_identity", "cosine", "train_image", "test_image", "same_name"),
            ((*names(pair), f"{pair.cosine:.4f}", *numbers(pair), int(pair.same_name)) for pair in pairs),
        )
        write_csv(
            partial / "duplicates.csv",
            ("train_image", "test_image", "cosine", "same_bytes"),
            ((*numbers(pair), f"{pair.cosine:.4f}", int(pair.same_bytes)) for pair in copies),
        )
        write_lines(partial / "without.txt", (our_names[label] for label in without))
        write_lines(partial / "without_images.txt", sorted(numbers(pair)[0] for pair in copies))

        def picture(pair: Shared | Duplicate, told: str) -> PairPicture:
            one, other = numbers(pair)
            return side_by_side(f"{pair.cosine:.3f} {told}", (ours, one), (theirs, other))

        write_review(
            partial / "report.html",
            "Overlap",
            f"{train} (left) and {test} (right), by {run}",
            [
                Tile(f"{len(without):,}", f"of {len(left.labels):,} training identities at {chosen:.3f} or more"),
                Tile(f"{len(copies):,}", f"of {len(left.rows):,} training images are test images, or nearly"),
                Tile(f"{sum(pair.same_name for pair in pairs):,}", "identities of the same name"),
            ],
            [
                PairGroup(
                    "The nearest identities, by their most alike images: the cosine of their means",
                    [picture(pair, " / ".join(names(pair))) for pair in pairs[:_SHOWN]],
                ),
                PairGroup(
                    "Images that are the same, or nearly",
                    [picture(pair, "same bytes" if pair.same_bytes else "") for pair in copies[:_SHOWN]],
                ),
            ],
        )
    why = "" if threshold is not None else f", which {_RARE:.0%} of {ours.name}'s identities reach with another of it"
    print(f"threshold {chosen:.4f}{why}")
    if len(own):
        share = (own >= chosen).mean()
        print(f"two halves of one identity of {ours.name} reach it in {share:.0%} of {len(own):,} cases")
    print(f"{len(without):,} of {len(left.labels):,} training identities are likely in {test}")
    if known := sum(pair.same_name for pair in pairs):
        both = sum(pair.same_name for pair in alike)
        print(f"{known:,} have the name of an identity there: {both:,} of these are as alike")
    exact = sum(pair.same_bytes for pair in copies)
    print(
        f"{len(copies):,} of {len(left.rows):,} training images are near duplicates of images there "
        f"(cosine {duplicate:g} or more), {exact:,} of them the same bytes"
    )
    print(f"wrote overlap.csv, duplicates.csv, without.txt, without_images.txt and report.html: {out}")
