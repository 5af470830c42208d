"""``pfc evaluate``: how well a trained backbone tells identities apart."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import find_device
from ..models import BatchSize, Device, Source, open_backbone


def evaluate(
    source: Source,
    pairs: Annotated[list[Path], typer.Option(metavar="FILE.bin", help="A verification set; others may follow.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE.bin]...", help="Further sets.")] = None,
    device: Device = "auto",
    batch_size: BatchSize = 128,
    json: Annotated[bool, typer.Option("--json", help="Print the results as a JSON list.")] = False,
) -> None:
    """Measure a trained backbone on verification sets.

    Accuracy is that of the 10-fold protocol, with the embeddings of an image and its mirror image added; TAR at FAR as
    far down as the number of pairs allows. `pfc pack pairs` makes a verification set.
    """
    from ...data import read_pairs
    from ...engine.evaluation import evaluate_pairs
    from ..spawn import usable_cores

    # All sets are read before the first is measured: a wrong name should not cost the time of the right ones.
    sets = [read_pairs(path) for path in (*pairs, *(more or []))]
    where = find_device(device)
    trained = open_backbone(source, where)
    results = []
    for one in sets:
        result, _ = evaluate_pairs(
            trained.model,
            one,
            image_size=trained.image_size,
            device=where,
            batch_size=batch_size,
            threads=usable_cores(),
        )
        results.append(result.to_dict())
    if json:
        from json import dumps

        print(dumps(results, indent=2))
    else:
        _print_table(results)


def _print_table(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("set")
    rates = sorted({key for result in results for key in result if key.startswith("tar_at_far_")})
    columns = {"pairs": "pairs", "accuracy": "accuracy", "accuracy_noflip": "no flip", "auc": "AUC", "eer": "EER"}
    columns |= {key: f"TAR@FAR {key.removeprefix('tar_at_far_')}" for key in rates}
    for title in columns.values():
        table.add_column(title, justify="right")
    for result in results:
        cells = {key: "–" if result.get(key) is None else f"{result[key]:.4f}" for key in columns}
        cells["pairs"] = f"{result['pairs']:,}"
        cells["accuracy"] += f" ± {result['accuracy_std']:.4f}"
        table.add_row(str(result["set"]), *cells.values())
    Console().print(table)
