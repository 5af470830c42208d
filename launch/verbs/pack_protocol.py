"""``pfc pack protocol``: the tables that say how embeddings are judged."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .pack_arguments import Seed

app = typer.Typer(
    help="Make the table of an evaluation protocol: from a packed set, or from a published set as it is distributed.",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the set, or the one that it lies in.")]
Table = Annotated[
    Path, typer.Argument(metavar="OUT.csv", help="Table to write, with OUT.pairs.csv if it has pairs; both are new.")
]


@app.command()
def records(
    source: Annotated[Path, typer.Argument(metavar="SET", help="A packed data set.")],
    out: Table,
    gallery_images: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images of an identity in the gallery; the others are probes.")
    ] = 1,
    non_mated: Annotated[
        float,
        typer.Option(min=0, max=1, metavar="SHARE", help="Share of identities whose images are all probes."),
    ] = 0.5,
    distractors: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="SET2",
            help="A packed set of other identities, which joins the gallery; may be given several times.",
            show_default=False,
        ),
    ] = None,
    most_distractors: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Most images of SET2, drawn by the seed. [dim]\\[default: all][/dim]",
            show_default=False,
        ),
    ] = None,
    retrieval: Annotated[
        bool, typer.Option("--retrieval", help="Search for each image among all others; no gallery and no probes.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Identification in a packed set: some identities with a gallery, the others as probes that must not be found.

    The identities should be none that the network was trained on. Images are named SET#NUMBER, SET relative to OUT.csv.
    """
    from ...data.protocols import made

    print(
        made.records(
            source,
            out,
            gallery_images=gallery_images,
            non_mated=non_mated,
            distractors=distractors or (),
            most_distractors=most_distractors,
            retrieval=retrieval,
            seed=seed,
        )
    )


@app.command()
def ijb(
    folder: Folder,
    out: Table,
    which: Annotated[Literal["IJBB", "IJBC"], typer.Option("--set", help="Which of both.", show_default=False)],
) -> None:
    """IJB-B or IJB-C as InsightFace packs them: templates, pairs of them, and landmarks to align the faces by.

    Reads from FOLDER/meta ijbc_face_tid_mid.txt, ijbc_name_5pts_score.txt and ijbc_template_pair_label.txt, and where
    they are there ijbc_1N_gallery_G1.csv, ijbc_1N_gallery_G2.csv and ijbc_1N_probe_mixed.csv (of IJB-B ijbb_..., S1 and
    S2). The images are those of FOLDER/loose_crop.
    """
    from ...data.protocols import published

    print(published.ijb(folder, out, which))


@app.command()
def market(folder: Folder, out: Table) -> None:
    """Market-1501: FOLDER/query is found in FOLDER/bounding_box_test, among what other cameras took.

    Identity and camera come from names such as 0001_c1s1_000151_01.jpg; -1 is left out, 0000 is a distractor.
    """
    from ...data.protocols import published

    print(published.market(folder, out))


@app.command()
def sop(folder: Folder, out: Table) -> None:
    """Stanford Online Products: each image of FOLDER/Ebay_test.txt is searched for among all others."""
    from ...data.protocols import published

    print(published.sop(folder, out))


@app.command()
def tinyface(folder: Folder, out: Table) -> None:
    """TinyFace: FOLDER/Probe is found in FOLDER/Gallery_Match, among FOLDER/Gallery_Distractor.

    An identity is the number before the first _ of a name. The three folders are those of its Testing_Set.
    """
    from ...data.protocols import published

    print(published.tinyface(folder, out))


@app.command()
def megaface(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of the images, or the one that both sets' folders lie in.")
    ],
    out: Table,
    probes: Annotated[
        Path, typer.Option(metavar="LIST.json", help="List of the probes, such as facescrub_features_list.json.")
    ],
    distractors: Annotated[
        Path,
        typer.Option(
            metavar="LIST.json", help="List of the distractors, such as megaface_features_list.json_1000000_1."
        ),
    ],
) -> None:
    """MegaFace: each two probes of one identity, the second alone among the distractors.

    Both lists are of its development kit: {"path": [...], "id": [...]}. Without ids a probe's folder is its identity.
    """
    from ...data.protocols import published

    print(published.megaface(folder, out, probes, distractors))


@app.command()
def trials(
    source: Annotated[
        Path, typer.Argument(metavar="LIST", help="Lines 'enroll test target|nontarget', or '1|0 enroll test'.")
    ],
    out: Table,
) -> None:
    """Verification of speakers: the pairs of a list of trials; utterances stand in the table as the list names them."""
    from ...data.protocols import made

    print(made.trials(source, out))
