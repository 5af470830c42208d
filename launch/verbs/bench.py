"""``pfc bench``: speed on this machine, always as a ratio to something measured in the same run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ...data.errors import UsageError

app = typer.Typer(help="Measure speed on this machine, beside a baseline in the same run.", no_args_is_help=True)


@app.command()
def head(
    classes: Annotated[list[int], typer.Option(min=1, help="Identities, C; may be given several times.")] = [100_000],  # noqa: B006
    rate: Annotated[list[float], typer.Option(help="Sample rate; may be given several times.")] = [1.0, 0.1],  # noqa: B006
    dim: Annotated[int, typer.Option(min=1, help="Embedding dimension, D.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Global batch.")] = 128,
    ranks: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process, on a CPU.")] = 1,
    precision: Annotated[list[str], typer.Option(help="Of the products: float32 or bf16.")] = ["float32"],  # noqa: B006
    objective: Annotated[str, typer.Option(help="See docs/objectives.md.")] = "cosface",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
) -> None:
    """Time whole steps of the head: forward, backward, row update.

    Beside it, in the same run, a plain dense head: all logits of the shard, and torch's SGD over the whole matrix.
    """
    if batch % ranks:
        raise UsageError(f"--batch {batch} does not divide into {ranks} ranks")
    for name in precision:
        if name not in ("float32", "bf16"):
            raise UsageError(f"--precision {name}: float32 or bf16")
    for share in rate:
        if not 0 < share <= 1:
            raise UsageError(f"--rate {share}: must lie in (0, 1]")
    from rich.console import Console
    from rich.table import Table

    from ..bench_head import HeadCase, measure

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("head", "classes", "rate", "products", "ms/step", "spread", "× dense", "peak MiB", "of dense"):
        table.add_column(title, justify="left" if title == "head" else "right", no_wrap=True)
    timings = []
    for count in classes:
        for name in precision:
            dense = measure(
                HeadCase("dense", count, dim, batch, 1.0, ranks, name, "cosface"), steps=steps, threads=threads
            )
            cases = [HeadCase("pfc", count, dim, batch, share, ranks, name, objective) for share in rate]
            timings += [dense, *(measure(case, steps=steps, threads=threads) for case in cases)]
            for timing in timings[-len(cases) - 1 :]:
                table.add_row(
                    timing.case.head,
                    f"{count:,}",
                    f"{timing.case.rate:g}",
                    name,
                    f"{1e3 * timing.median:.1f}",
                    f"{1e3 * timing.fastest:.1f}–{1e3 * timing.slowest:.1f}",
                    f"{dense.median / timing.median:.2f}",
                    f"{timing.peak_bytes / 2**20:,.0f}",
                    f"{timing.peak_bytes / max(dense.peak_bytes, 1):.2f}",
                )
    console = Console()
    console.print(table, width=console.width if console.is_terminal else 200)
    if json_file is not None:
        json_file.write_text(json.dumps([timing.to_dict() for timing in timings], indent=2), encoding="utf-8")
