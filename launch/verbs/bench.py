"""``pfc bench``: speed on this machine, always as a ratio to something measured in the same run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ...data.errors import UsageError
from ..console import print_table

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
    peer: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A local checkout's folder of the common implementation, with partial_fc_v2.py and losses.py: "
            "its head is measured too, at every rate.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
) -> None:
    """Time whole steps of the head: forward, backward, row update.

    Beside it, in the same run, a plain dense head (all logits of the shard, and torch's SGD over the whole matrix) and,
    with --peer, the common implementation's. Every line runs in processes of its own.
    """
    if peer is not None and not (peer / "partial_fc_v2.py").is_file():
        raise UsageError(f"--peer {peer}: no partial_fc_v2.py there; give the folder that holds it")
    if batch % ranks:
        raise UsageError(f"--batch {batch} does not divide into {ranks} ranks")
    for name in precision:
        if name not in ("float32", "bf16"):
            raise UsageError(f"--precision {name}: float32 or bf16")
    for share in rate:
        if not 0 < share <= 1:
            raise UsageError(f"--rate {share}: must lie in (0, 1]")
    from ..bench_head import HeadCase, HeadTiming, measure

    titles = ("head", "classes", "rate", "products", "ms/step", "spread", "peak MiB", "× dense", "× peer", "of peer")
    lines: list[tuple[str, ...]] = []
    timings = []
    for count in classes:
        for name in precision:
            dense = measure(HeadCase("dense", count, dim, batch, 1.0, ranks, name), steps=steps, threads=threads)
            rows: list[tuple[HeadTiming, HeadTiming | None]] = [(dense, None)]
            for share in rate:
                case = HeadCase("pfc", count, dim, batch, share, ranks, name, objective)
                ours = measure(case, steps=steps, threads=threads)
                theirs = None
                if peer is not None:  # it knows no bf16 on a CPU: its float32 is what a user of it has
                    case = HeadCase("peer", count, dim, batch, share, ranks, "float32", "cosface", str(peer.resolve()))
                    theirs = measure(case, steps=steps, threads=threads)
                    rows.append((theirs, None))
                rows.append((ours, theirs))
            for timing, theirs in rows:
                timings.append(timing)
                line = (
                    timing.case.head,
                    f"{count:,}",
                    f"{timing.case.rate:g}",
                    timing.case.precision,
                    f"{1e3 * timing.median:.1f}",
                    f"{1e3 * timing.fastest:.1f}–{1e3 * timing.slowest:.1f}",
                    f"{timing.peak_bytes / 2**20:,.0f}",
                    f"{dense.median / timing.median:.2f}",
                    "" if theirs is None else f"{theirs.median / timing.median:.2f}",
                    "" if theirs is None else f"{timing.peak_bytes / max(theirs.peak_bytes, 1):.2f}",
                )
                lines.append(line)
    print_table(titles, lines)
    if json_file is not None:
        json_file.write_text(json.dumps([timing.to_dict() for timing in timings], indent=2), encoding="utf-8")
