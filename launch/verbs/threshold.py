"""``pfc threshold``: the cosine from which two images are taken for one identity."""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...data.errors import UsageError
from ..console import complete_run, find_device, print_table
from ..models import BatchSize, Device, Flip, Memory, Samples, check_new_file, open_backbone

if TYPE_CHECKING:
    from ...data import Pairs
    from ...data.protocols.table import Protocol
    from ...engine.evaluation.threshold import Compared


def threshold(
    on: Annotated[Path, typer.Option("--on", metavar="SET", help="Choose it on this set: a .bin file or a protocol.")],
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN_OR_CHECKPOINT]",
            help="A run's folder or one checkpoint; none with --embeddings.",
            autocompletion=complete_run,
        ),
    ] = None,
    fmr: Annotated[
        float, typer.Option(min=0, max=1, help="False match rate: the share of pairs of two identities that may pass.")
    ] = 1e-4,
    check: Annotated[
        list[Path] | None, typer.Option(metavar="SET", help="Say what it gives there; may be given several times.")
    ] = None,
    embeddings: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.npz|.npy", help="Of any network, instead of a run: one file for --on, then for each --check."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Draw the rates, and the calibration.")
    ] = None,
    samples: Samples = 200,
    memory: Memory = 512,
    device: Device = "auto",
    batch_size: BatchSize = 128,
    flip: Flip = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Choose the threshold for a false match rate on one set, and say what it gives on others, and why.

    Pairs are those of the .bin file or beside the table; of a table without pairs every two images that have an
    identity, or every two templates. Where the table has a column group, false matches are counted within each group
    too. A threshold is good for people and images like those it was chosen on: check it on a set like yours.
    """
    from ...engine.evaluation.judgement import How
    from ...engine.evaluation.threshold import explain, operate, score

    sets = [on, *(check or [])]
    if (source is None) == (not embeddings):
        raise UsageError("give a run or a checkpoint, or --embeddings")
    if embeddings and len(embeddings) != len(sets):
        raise UsageError(
            f"--embeddings: {len(embeddings)} file(s) for {len(sets)} set(s): give one for each, in their order"
        )
    if not fmr > 0:
        raise UsageError("--fmr 0: no threshold promises that; give a rate above 0")
    if report is not None:
        check_new_file(report, ".html")
    where = find_device(device)
    how = How(where, memory << 20, samples)
    opened = [_opened(path, images=not embeddings) for path in sets]
    names = [one.name for one in opened]
    if len(set(names)) < len(names):
        raise UsageError(f"two sets are called {max(names, key=names.count)!r}: rename one of the files")
    trained = open_backbone(source, where) if source is not None else None
    points, chosen = [], 0.0
    for place, one in enumerate(opened):
        reading = trained.reading(where, batch_size, flip=flip) if trained is not None else {}
        compared = _compared(one, trained, reading, embeddings[place] if embeddings else None)
        scores = score(compared, how)
        if not place:
            chosen = scores.threshold(fmr)
        points.append(operate(compared, scores, chosen, fmr, how))
    told = {other.name: explain(points[0], other, chosen, fmr) for other in points[1:]}
    if report is not None:
        from ...engine.report.write import write_threshold

        lines = [f"{name}: {line}" for name, of in told.items() for line in of]
        write_threshold(report, str(source or embeddings), chosen, fmr, points, lines)
    if json:
        every = [{**point.to_dict(), "why": told.get(point.name, [])} for point in points]
        print(dumps({"threshold": chosen, "fmr": fmr, "sets": every}, indent=2))
        return
    print(f"threshold  {chosen:.4f}, for a false match rate of {fmr:g} on {points[0].name}")
    rows = []
    for point in points:
        of = int(point.scores.different.sum())
        rows.append(
            (point.name, f"{point.fmr:.2e}{_interval(point, 'fmr', '.1e')}", f"{point.false_matches:,} of {of:,}")
        )
        rows[-1] += (f"{point.fnmr:.4f}{_interval(point, 'fnmr', '.4f')}", f"{int(point.scores.same.sum()):,}")
    print_table(("set", "false match rate", "pairs", "false non-match rate", "genuine pairs"), rows)
    for point in points:
        if point.groups:
            shares = [
                (name, f"{wrong / of:.2e}" if of else "–", f"{wrong:,} of {of:,}")
                for name, (wrong, of) in point.groups.items()
            ]
            print_table((f"group, {point.name}", "false match rate", "pairs"), shares)
    for name, lines in told.items():
        print(f"{name}, beside {points[0].name}:")
        for line in lines:
            print(f"  - {line}")
    if report is not None:
        print(f"report     {report}")


def _interval(point: Any, name: str, shape: str) -> str:
    if name not in point.intervals:
        return ""
    low, high = point.intervals[name]
    return f" [{low:{shape}}, {high:{shape}}]"


def _opened(path: Path, *, images: bool) -> "Pairs | Protocol":
    """UsageError also where ``images`` are wanted, and are not there."""
    from ...data import read_pairs
    from ...data.protocols.images import open_images
    from ...data.protocols.table import read_protocol

    if path.suffix == ".bin":
        return read_pairs(path)
    protocol = read_protocol(path)
    if images:
        open_images(protocol.images, protocol.folder)
    return protocol


def _compared(one: "Pairs | Protocol", trained: Any, reading: dict[str, Any], file: Path | None) -> "Compared":
    from ...data import Pairs
    from ...engine.evaluation.elsewhere import read_embeddings, rows_of_table
    from ...engine.evaluation.threshold import Compared

    if isinstance(one, Pairs):
        found = trained.embed(one.images, reading) if file is None else read_embeddings(file).embeddings
        return Compared.of_pairs(one, found)
    if file is None:
        return Compared.of_protocol(one, trained.embed_protocol(one, reading))
    return Compared.of_protocol(one, rows_of_table(file, read_embeddings(file), one))
