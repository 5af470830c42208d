"""``pfc evaluate``: how well a trained backbone tells identities apart."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import find_device, print_table
from ..models import BatchSize, Device, Flip, Source, open_backbone

if TYPE_CHECKING:
    from ...data import Pairs


def evaluate(
    source: Source,
    pairs: Annotated[list[Path], typer.Option(metavar="FILE.bin", help="A verification set; others may follow.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE.bin]...", help="Further sets.")] = None,
    device: Device = "auto",
    nproc: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Ranks that share the work: one a GPU, or one process with all cores."),
    ] = 1,
    batch_size: BatchSize = 128,
    flip: Flip = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as a JSON list.")] = False,
) -> int:
    """Measure a trained backbone on verification sets.

    Accuracy is that of the 10-fold protocol, with the embeddings of an image and its mirror image added and without;
    TAR at FAR as far down as the number of pairs allows. The network computes in the precision of its run, as the
    run's own evaluations do. `pfc pack pairs` makes a verification set.
    """
    from ...data import read_pairs
    from ..rank import preload
    from ..spawn import run_ranks

    # All sets are read before the first is measured: a wrong name should not cost the time of the right ones.
    sets = [read_pairs(path) for path in (*pairs, *(more or []))]
    measure = partial(_measure, source, sets, device=device, batch_size=batch_size, flip=flip, as_json=json)
    if nproc == 1 or "WORLD_SIZE" in os.environ:
        return measure()
    preload("pfc.engine.evaluation.evaluate")
    return run_ranks(measure, nproc)


def _measure(
    source: Path, sets: "Sequence[Pairs]", *, device: str, batch_size: int, flip: bool | None, as_json: bool
) -> int:
    """Measures and prints; on every rank where there are several."""
    from ...engine.evaluation.evaluate import evaluate_pairs
    from ...engine.ranks import distributed
    from ..machine import usable_cores

    where = find_device(device)
    with distributed.start(device=where) if "WORLD_SIZE" in os.environ else nullcontext() as world:
        trained = open_backbone(source, where)
        results = []
        for one in sets:
            with trained.autocast(where):
                result, _ = evaluate_pairs(
                    trained.model,
                    one,
                    image_size=trained.image_size,
                    device=where,
                    batch_size=batch_size,
                    flip=trained.flip if flip is None else flip,
                    threads=max(1, usable_cores() // (world.size if world is not None else 1)),
                    moved=world.heartbeat.moved if world is not None else lambda: None,
                )
            results.append({**result.to_dict(), "precision": trained.precision})
    if world is None or world.is_main:
        if as_json:
            print(dumps(results, indent=2))
        else:
            _print_table(results)
            if trained.precision != "float32":
                print(f"computed in {trained.precision}, as in its run")
    return 0


def _print_table(results: list[dict[str, Any]]) -> None:
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
