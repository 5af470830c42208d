"""``pfc clean``: images and labels of a packed set that look wrong to a trained network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ...data.tables import write_csv
from ..console import find_device, progress_bar
from ..models import BatchSize, Device, NewFolder, Run, check_new_folder, new_folder, open_backbone, stored_embeddings
from ..review import Names, side_by_side, write_lines

_SHOWN = 30  # of each kind in the report


def clean(
    dataset: Annotated[Path, typer.Argument(metavar="SET", help="The packed data set.")],
    out: NewFolder,
    run: Run,
    outlier: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="Cosine with its identity below which an image is an outlier. [dim]\\[default: where one more wrong "
            "image would cost five correct ones][/dim]",
            show_default=False,
        ),
    ] = None,
    alike: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="Cosine from which two labels are likely one identity. [dim]\\[default: the median of the halves of "
            "one identity][/dim]",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    batch_size: BatchSize = 128,
) -> None:
    """List images that are likely mislabelled, labels that are likely one identity, and labels that are likely two.

    Nothing is changed: look at OUT/report.html first. OUT/outliers.txt: numbers of images, those least like their
    identity first; `pfc pack recordio SET NEW --without-images OUT/outliers.txt` leaves them out. OUT/merged.csv: two
    labels and the cosine of their means. OUT/split.csv: a label, the sizes of its halves, the cosine of their means,
    and the images of the smaller half.
    """
    import numpy as np

    from ...data import RecordDataset
    from ...engine.report.pictures import PairGroup, PairPicture
    from ...engine.report.write import Tile, write_review
    from ...engine.review.embedded import typical
    from ...engine.review.labels import FEWEST, merged, merged_threshold, outliers, splits

    check_new_folder(out)
    where = find_device(device)
    images = RecordDataset.open(dataset)
    names = Names(images)
    trained = open_backbone(run, where)
    with (
        new_folder(out) as partial,
        stored_embeddings(trained, images, where, batch_size, partial / "set.npy") as embedded,
    ):
        far = outliers(embedded, outlier, device=where)
        chosen = merged_threshold(embedded) if alike is None else alike
        one = merged(embedded, chosen, device=where)
        with progress_bar("splitting") as progress:
            two = splits(embedded, far.limit, progress=progress)

        def name(code: int) -> str:
            return names[int(embedded.labels[code])]

        def numbers(rows: Sequence[int]) -> list[int]:
            return embedded.numbers[np.array(rows, dtype=np.int64)].tolist()

        write_lines(partial / "outliers.txt", numbers(far.rows.tolist()))
        write_csv(
            partial / "merged.csv",
            ("label_a", "label_b", "cosine"),
            ((name(a), name(b), f"{c:.4f}") for a, b, c in one),
        )
        rows = []
        for found in two:
            smaller = " ".join(map(str, numbers(found.smaller.tolist())))
            rows.append((name(found.code), len(found.larger), len(found.smaller), f"{found.cosine:.4f}", smaller))
        titles = ("label", "larger", "smaller", "cosine", "images_of_the_smaller")
        write_csv(partial / "split.csv", titles, rows)

        def picture(told: str, *rows: int) -> PairPicture:
            return side_by_side(told, *((images, number) for number in numbers(rows)))

        def outlying(place: int) -> PairPicture:
            row = int(far.rows[place])
            own, other = int(embedded.codes[row]), int(far.code[place])
            told = f"{name(own)} {far.own[row]:.3f} / {name(other)} {far.other[place]:.3f}"
            return picture(told, row, typical(embedded, own), typical(embedded, other))

        write_review(
            partial / "report.html",
            "Labels to look at",
            f"{dataset}, by {run}",
            [
                Tile(f"{len(far.rows):,}", f"of {len(embedded.rows):,} images are likely of another identity"),
                Tile(f"{len(one):,}", f"pairs of labels are likely one identity: {chosen:.3f} or more"),
                Tile(f"{len(two):,}", f"of {len(embedded.labels):,} labels are likely two identities"),
            ],
            [
                PairGroup(
                    "Outliers: the image, its identity, the nearest other one; its cosines with them",
                    [outlying(place) for place in range(min(_SHOWN, len(far.rows)))],
                ),
                PairGroup(
                    "Two labels that are likely one identity, by their typical images",
                    [
                        picture(f"{name(a)} / {name(b)} {c:.3f}", typical(embedded, a), typical(embedded, b))
                        for a, b, c in one[:_SHOWN]
                    ],
                ),
                PairGroup(
                    "Labels that are likely two identities: two images of the larger half, two of the smaller",
                    [
                        picture(f"{name(s.code)} {s.cosine:.3f}", *s.larger[:2].tolist(), *s.smaller[:2].tolist())
                        for s in two[:_SHOWN]
                    ],
                ),
            ],
        )
    few = int((embedded.counts < FEWEST).sum())
    below = f": their cosine with their own is below {far.threshold:.4f}" if far.threshold > -1 else ""
    print(f"{len(far.rows):,} of {len(embedded.rows):,} images are likely of another identity{below}")
    if outlier is None:
        print(
            f"by the cosines of images with a random other identity, about {far.share:.1%} of the images are of "
            "another one" + ("; the threshold stands where one more of these would cost five others" if below else "")
        )
    if few:
        print(
            f"{few:,} of {len(embedded.labels):,} labels have less than {FEWEST} images: too few to say which is wrong"
        )
    print(f"{len(one):,} pairs of labels are likely one identity: the cosine of their means is {chosen:.4f} or more")
    print(f"{len(two):,} of {len(embedded.labels):,} labels are likely two identities")
    print(f"wrote outliers.txt, merged.csv, split.csv and report.html: {out}")
