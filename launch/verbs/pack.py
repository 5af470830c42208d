"""``pfc pack``: images into RecordIO shards, pairs into verification sets, and the tables of protocols."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ...data.errors import UsageError
from ..console import parse_size, progress_bar
from . import pack_protocol
from .pack_arguments import Out, Overwrite, Quality, Seed, Shards, Size, Workers
from .pack_sources import folder, list_file, recordio, table, webdataset

app = typer.Typer(
    help="Pack images into a data set (RecordIO shards), pairs into a verification set; or make a protocol's table.",
    no_args_is_help=True,
)

app.command()(folder)
app.command("list")(list_file)
app.command()(recordio)
app.command()(table)
app.command()(webdataset)
app.add_typer(pack_protocol.app, name="protocol")


@app.command()
def glyphs(
    out: Out,
    identities: Annotated[int, typer.Option(min=1, help="Characters to train on.")] = 2000,
    images_per_identity: Annotated[int, typer.Option(min=2, help="Images of each character.")] = 20,
    size: Annotated[int, typer.Option(min=16, metavar="PX", help="Side of the images in pixels.")] = 40,
    heldout_identities: Annotated[int, typer.Option(min=1, help="Characters kept out of training.")] = 300,
    heldout_pairs: Annotated[int, typer.Option(min=1, help="Pairs of the verification set.")] = 3000,
    font: Annotated[
        list[Path] | None,
        typer.Option(
            help="A font file, a folder of fonts, or of pictures named by code points (1f600.png); may be given "
            "several times. "
            "[dim]\\[default: those of the demo extra and of this machine][/dim]",
            show_default=False,
        ),
    ] = None,
    heldout_font: Annotated[
        list[str] | None,
        typer.Option(
            help="Part of the names of fonts to keep out of training; may be given several times.", show_default=False
        ),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Fonts of another kind, such as handwriting, to judge with as well: OUT/NAME, NAME.bin, NAME.csv.",
            show_default=False,
        ),
    ] = None,
    fewest_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="A long tail: training images of a character fall from --images-per-identity to this.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[float, typer.Option(min=0, max=1, help="Share of characters that are two identities.")] = 0.0,
    blurred: Annotated[float, typer.Option(min=0, max=1, help="Share of training images out of focus.")] = 0.0,
    tiny: Annotated[float, typer.Option(min=0, max=1, help="Share of training images of few pixels.")] = 0.0,
    mislabelled: Annotated[float, typer.Option(min=0, max=1, help="Share of training images of a wrong label.")] = 0.0,
    quality: Quality = 92,
    shards: Shards = 1,
    workers: Workers = None,
    seed: Seed = 0,
) -> None:
    """Draw a real data set from fonts: a character is an identity, a font with a distortion is a photograph.

    Writes OUT/train, OUT/heldout, and what they are judged by: OUT/heldout.bin and OUT/identify.csv. The held-out
    characters and the held-out fonts are not in train, so these measure how well identities never seen are told apart:
    in pairs, and in a search among images of the training characters.
    """
    from ...data import pack_glyphs

    domains: dict[str, list[Path]] = {}
    for one in domain or []:
        name, equals, path = one.partition("=")
        if not (equals and path):
            raise UsageError(f"--domain {one}: write NAME=PATH, a name and a folder of fonts")
        domains.setdefault(name, []).append(Path(path))
    with progress_bar("drawing") as progress:
        summary = pack_glyphs(
            out,
            identities=identities,
            images_per_identity=images_per_identity,
            size=size,
            heldout_identities=heldout_identities,
            heldout_pairs=heldout_pairs,
            fonts=font,
            heldout_fonts=heldout_font,
            domains=domains,
            fewest_images=fewest_images,
            split=split,
            blurred=blurred,
            tiny=tiny,
            mislabelled=mislabelled,
            quality=quality,
            shards=shards,
            workers=workers,
            seed=seed,
            progress=progress,
        )
    print(summary)


@app.command()
def synthetic(
    out: Out,
    identities: Annotated[int, typer.Option(min=1, help="Number of identities.")],
    images_per_identity: Annotated[int, typer.Option(min=1, help="Images of each identity.")] = 10,
    size: Size = "112",
    quality: Quality = 90,
    shards: Shards = 1,
    workers: Workers = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make a data set of coloured patterns, for tests and for measuring speed."""
    from ...data import pack_synthetic

    sides = parse_size(size)
    if sides is None:
        raise UsageError("--size keep: synthetic images have no size of their own; write pixels, such as 112")
    with progress_bar("drawing") as progress:
        summary = pack_synthetic(
            out,
            identities=identities,
            images_per_identity=images_per_identity,
            size=sides,
            quality=quality,
            shards=shards,
            workers=workers,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    print(summary)


@app.command()
def pairs(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A packed data set; with --list, the folder of the listed images.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.bin", help="File to write; it must not exist.")],
    number: Annotated[
        int | None,
        typer.Option(
            "--pairs",
            min=1,
            help="Pairs to draw, half of them matching. [dim]\\[default: 6000, or as many as there are][/dim]",
            show_default=False,
        ),
    ] = None,
    list_file: Annotated[
        Path | None,
        typer.Option("--list", metavar="FILE", help="Take these pairs: lines 'pathA pathB 0|1', or LFW's pairs.txt."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Make a verification set: pairs of images and whether they show the same identity."""
    from ...data import RecordDataset, make_pairs, pairs_from_list, write_pairs
    from ...data.pairs.pairs import DEFAULT_PAIRS

    made: Any
    if list_file is not None:
        made = pairs_from_list(list_file, source)
    else:
        made = make_pairs(RecordDataset.open(source), number, seed)
    write_pairs(out, made)
    few = list_file is None and number is None and len(made.same) < DEFAULT_PAIRS
    why = f" (as many as the set has of both kinds; {DEFAULT_PAIRS:,} are usual)" if few else ""
    print(f"wrote {len(made.same):,} pairs, {int(made.same.sum()):,} of them matching{why}: {out}")
