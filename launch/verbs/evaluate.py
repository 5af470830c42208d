"""``pfc evaluate``: how well a trained backbone, or embeddings from elsewhere, tell identities apart."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
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
    from ...engine.evaluation.protocol import How, Judgement

Source = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RUN_OR_CHECKPOINT]",
        help="A run's folder (its latest checkpoint) or one checkpoint; none with --embeddings.",
        show_default=False,
        autocompletion=complete_run,
    ),
]


def evaluate(
    source: Source = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE.bin]...", help="Further sets of pairs.")] = None,
    pairs: Annotated[
        list[Path] | None, typer.Option(metavar="FILE.bin", help="A verification set; may be given several times.")
    ] = None,
    protocol: Annotated[
        list[Path] | None,
        typer.Option(metavar="TABLE", help="A protocol (.csv, .tsv, .parquet); may be given several times."),
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz|.npy",
            help="Judge these, of any network, instead of a run's: `embeddings` [N, D] in the table's order, or with "
            "`names` of its images; with `labels` and no table each among all others.",
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="What a protocol's images are relative to. [dim]\\[default: the table's folder][/dim]",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write curves, and the worst probes as pictures, there.")
    ] = None,
    samples: Samples = 200,
    memory: Memory = 512,
    device: Device = "auto",
    nproc: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Ranks that share the work: one a GPU, or one process with all cores."),
    ] = 1,
    batch_size: BatchSize = 128,
    flip: Flip = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as a JSON list.")] = False,
) -> int:
    """Measure a trained backbone, or embeddings from elsewhere, on verification sets and protocols.

    Accuracy is that of the 10-fold protocol, with the embeddings of an image and its mirror image added and without;
    TAR at FAR as far down as the number of pairs allows. What a protocol measures follows from its columns: see
    docs/evaluation.md. The network computes in the precision of its run, as the run's own evaluations do.
    `pfc pack pairs` makes a verification set, `pfc pack protocol` a protocol.
    """
    from ...data import read_pairs
    from ...data.protocols.images import open_images
    from ...data.protocols.table import read_protocol
    from ..rank import preload
    from ..spawn import run_ranks

    if source is None and embeddings is None:
        raise UsageError("give a run or a checkpoint, or --embeddings with a file of them")
    if source is not None and embeddings is not None:
        if source.suffix != ".bin":  # of pairs, which the first place may hold with --embeddings
            raise UsageError(f"{source} and --embeddings: give one of them")
        more = [source, *(more or [])]
    if report is not None:
        check_new_file(report, ".html")
    # All sets are read before the first is measured: a wrong name should not cost the time of the right ones.
    sets = [read_pairs(path) for path in (*(pairs or []), *(more or []))]
    protocols = [read_protocol(path, root) for path in protocol or []]
    if embeddings is None:
        if not sets and not protocols:
            raise UsageError("give what to measure on: --pairs FILE.bin or --protocol TABLE")
        if report is not None and not protocols:
            raise UsageError(
                "--report draws what protocols say, and a run's own report its pairs: give --protocol TABLE"
            )
        assert source is not None
        images = [open_images(one.images, one.folder) for one in protocols]
        network = partial(_Network, source, sets, protocols, device, batch_size, flip)
    else:
        network = partial(_Elsewhere, embeddings, sets, protocols, device)
        images = [_images_or_none(one) for one in protocols]
    measure = partial(_measure, network, samples, memory << 20, as_json=json, report=report, images=images)
    if nproc == 1 or "WORLD_SIZE" in os.environ:
        return measure()
    preload("pfc.engine.evaluation.sets")
    return run_ranks(measure, nproc)


def _measure(judge_by: Any, samples: int, memory: int, *, as_json: bool, report: Path | None, images: list[Any]) -> int:
    """Measures and prints; on every rank where there are several."""
    from ...engine.evaluation.protocol import How
    from ...engine.ranks import distributed

    by = judge_by()
    with distributed.start(device=by.device) if "WORLD_SIZE" in os.environ else nullcontext() as world:
        moved = world.heartbeat.moved if world is not None else lambda: None
        results = [found | {"seconds": seconds} for found, seconds in _timed(by.pairs(world, moved))]
        timed = list(_timed(by.protocols(world, How(by.device, memory, samples, moved))))
    if world is None or world.is_main:
        if as_json:
            told = [*results, *(one.to_dict() | {"seconds": seconds} for one, seconds in timed)]
            print(dumps([{**one, "precision": by.precision} for one in told], indent=2))
        else:
            if results:
                _print_pairs(results)
            for one, seconds in timed:
                _print_judgement(one, seconds)
            if by.precision not in ("float32", None):
                print(f"computed in {by.precision}, as in its run")
        if report is not None:
            from ...engine.report.write import write_judgements

            judged = [one for one, _ in timed]
            write_judgements(report, by.subtitle, list(zip(judged, images or [None] * len(judged), strict=True)))
            if not as_json:
                print(f"report     {report}")
    return 0


class _Network:
    """A trained backbone judges images."""

    def __init__(
        self,
        source: Path,
        sets: "Sequence[Pairs]",
        protocols: "Sequence[Protocol]",
        device: str,
        batch_size: int,
        flip: bool | None,
    ) -> None:
        from ...data.loading.dali import import_dali

        import_dali()  # now: it is not part of the first set's seconds
        self.device = find_device(device)
        self._trained = open_backbone(source, self.device)
        self._sets, self._protocols = sets, protocols
        self._choice = (batch_size, flip)
        self.precision, self.subtitle = self._trained.precision, str(source)

    def pairs(self, world: Any, moved: Any) -> Any:
        from ...engine.evaluation.evaluate import evaluate_pairs

        for one in self._sets:
            with self._trained.autocast(self.device):
                found, _ = evaluate_pairs(self._trained.model, one, **self._reading(world, moved))
            yield found.to_dict()

    def protocols(self, world: Any, how: "How") -> Any:
        from ...engine.evaluation.protocol import judge

        for protocol in self._protocols:
            found = self._trained.embed_protocol(protocol, self._reading(world, how.moved))
            yield judge(protocol, found, how)

    def _reading(self, world: Any, moved: Any) -> dict[str, Any]:
        batch_size, flip = self._choice
        ranks = world.size if world is not None else 1
        return {**self._trained.reading(self.device, batch_size, flip=flip, ranks=ranks), "moved": moved}


class _Elsewhere:
    """Embeddings that another program has made."""

    def __init__(self, path: Path, sets: "Sequence[Pairs]", protocols: "Sequence[Protocol]", device: str) -> None:
        from ...engine.evaluation.elsewhere import protocol_of_labels, read_embeddings

        self.device = find_device(device)
        self.precision, self.subtitle = None, str(path)
        self._path, self._sets = path, sets
        self._found = read_embeddings(path)
        self._protocols = protocols
        if not sets and not protocols:
            self._protocols = [protocol_of_labels(path, self._found)]

    def pairs(self, world: Any, moved: Any) -> Any:
        from ...engine.evaluation.elsewhere import judge_pairs

        for one in self._sets:
            yield judge_pairs(self._path, self._found, one)

    def protocols(self, world: Any, how: "How") -> Any:
        from ...engine.evaluation.elsewhere import rows_of_table
        from ...engine.evaluation.protocol import judge

        for protocol in self._protocols:
            yield judge(protocol, rows_of_table(self._path, self._found, protocol), how)


def _images_or_none(protocol: "Protocol") -> Any:
    """The images, for the report, where they are here."""
    from ...data.protocols.images import open_images

    try:
        return open_images(protocol.images, protocol.folder)
    except UsageError:
        return None


def _timed(found: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each with the seconds that it took."""
    begun = time.monotonic()
    for one in found:
        yield one, round(time.monotonic() - begun, 3)
        begun = time.monotonic()


def _print_judgement(judgement: "Judgement", seconds: float) -> None:
    from ...engine.evaluation.figures import rows_of

    about, figures = rows_of(judgement)
    print(f"{judgement.set}: {about} ({seconds:.1f} s)")
    rows = [
        (
            one.title,
            f"{one.value:.4f}",
            "" if one.interval is None else f"{one.interval[0]:.4f} … {one.interval[1]:.4f}",
            "" if one.impostors is None else f"{one.impostors:,}",
        )
        for one in figures
    ]
    heads = ("figure", "value", "95 % interval", "impostors")
    used = [place for place in range(4) if place < 2 or any(row[place] for row in rows)]
    print_table([heads[place] for place in used], [[row[place] for place in used] for row in rows])


def _print_pairs(results: list[dict[str, Any]]) -> None:
    rates = sorted({key for result in results for key in result if key.startswith("tar_at_far_")})
    columns = {"pairs": "pairs", "accuracy": "accuracy", "accuracy_flip": "with flip", "accuracy_noflip": "no flip"}
    columns |= {"auc": "AUC", "eer": "EER"}
    columns |= {key: f"TAR@FAR {key.removeprefix('tar_at_far_')}" for key in rates}
    rows = []
    for result in results:
        cells = {key: "–" if result.get(key) is None else f"{result[key]:.4f}" for key in columns}
        cells["pairs"] = f"{result['pairs']:,}"
        cells["accuracy"] += f" ± {result['accuracy_std']:.4f}"
        rows.append((str(result["set"]), *cells.values()))
    print_table(("set", *columns.values()), rows)
