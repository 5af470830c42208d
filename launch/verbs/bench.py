"""``pfc bench``: speed on this machine, always as a ratio to something measured in the same run."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ...data.errors import UsageError
from ..console import check_outputs, warn
from . import bench_data

app = typer.Typer(help="Measure speed on this machine, with a baseline in the same run.", no_args_is_help=True)

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")]
Dense = Annotated[bool, typer.Option(help="Measure the plain dense head too.")]
Peer = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="A local checkout's folder of the common implementation, with partial_fc_v2.py and losses.py: "
        "its head is measured too, at every rate.",
    ),
]
Warmup = Annotated[int, typer.Option(min=0, help="Untimed steps before.")]
app.command()(bench_data.data)


@app.command()
def head(
    classes: Annotated[list[int], typer.Option(min=1, help="Identities, C.")] = [100_000],  # noqa: B006
    rate: Annotated[list[float] | None, typer.Option(help="Sample rate. [dim]\\[default: 1.0, 0.1][/dim]")] = None,
    sampled: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="K", help="Classes sampled a step, in place of --rate: the rate is K/C at each C."),
    ] = None,
    dim: Annotated[list[int], typer.Option(min=1, help="Embedding dimension, D.")] = [512],  # noqa: B006
    batch: Annotated[list[int], typer.Option(min=1, help="Global batch.")] = [128],  # noqa: B006
    ranks: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Processes. [dim]\\[default: one for each GPU; without a GPU two][/dim]"),
    ] = None,
    precision: Annotated[list[str], typer.Option(help="Of the products: float32 or bf16.")] = ["float32"],  # noqa: B006
    objective: Annotated[list[str], typer.Option(help="See docs/objectives.md.")] = ["cosface"],  # noqa: B006
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process, on a CPU.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each line and round.")] = 5,
    warmup: Warmup = 2,
    rounds: Annotated[int, typer.Option(min=1, help="How often all lines are measured, one after the other.")] = 2,
    dense: Dense = True,
    peer: Peer = None,
    json_file: JsonFile = None,
    picture: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the figures there.")] = None,
) -> int:
    """Time whole steps of the head: forward, backward, row update.

    Options from --classes to --objective may be given several times; all combinations are measured, each in processes
    of its own. For comparison, in the same run, a plain dense head (all logits of the shard, and torch's SGD over the
    whole matrix) and, with --peer, the common implementation's; and what this machine can do at best, from which
    "× floor" follows: docs/performance.md.
    """
    if rate and sampled:
        raise UsageError("give --rate or --sampled, not both")
    check_outputs(json_file, picture=picture)
    from ...benchmarks.head.grid import HeadGrid, measure_grid
    from ...benchmarks.head.table import report
    from ..machine import default_ranks

    grid = HeadGrid(
        classes=tuple(classes),
        rate=tuple(rate or (1.0, 0.1)),
        sampled=tuple(sampled or ()),
        batch=tuple(batch),
        dim=tuple(dim),
        ranks=tuple(ranks or [default_ranks()]),
        precision=tuple(precision),
        objective=tuple(objective),
        threads=threads,
        steps=steps,
        warmup=warmup,
        rounds=rounds,
        dense=dense,
        peer="" if peer is None else str(peer),
    )
    grid.checked()
    _tell_cores(max(grid.ranks) * threads)
    with _progress() as tell:
        results = measure_grid(grid, tell)
    print("\n".join(report(results)))
    _write_json(json_file, results.to_dict())
    if picture is not None and any(line.rounds for line in results.lines if line.case.head == "pfc"):
        from ...benchmarks.head.plot import plot

        plot(results, picture)
    for line in results.lines:
        if line.error:
            warn(line.error)
    return int(any(line.died for line in results.lines))


@app.command()
def scale(
    classes: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Identities, C. [dim]\\[default: 10⁴, 10⁵, 10⁶, 10⁷][/dim]", show_default=False),
    ] = None,
    rate: Annotated[list[float] | None, typer.Option(help="Sample rate. [dim]\\[default: 0.1][/dim]")] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Classes sampled a step, in place of --rate: the rate is N/C at each C."),
    ] = None,
    ranks: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Processes. [dim]\\[default: as of head; with --simulate none][/dim]"),
    ] = None,
    simulate: Annotated[
        list[int] | None,
        typer.Option(
            metavar="W",
            help="Measure one rank of a world of W, too: its memory and computation are real, the others do not exist.",
        ),
    ] = None,
    storage: Annotated[list[str], typer.Option(help="Of the centers: device, host or file.")] = ["device"],  # noqa: B006
    storage_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the centers' files, on a local disk. [dim]\\[default: --output][/dim]"
        ),
    ] = None,
    center_dtype: Annotated[list[str], typer.Option(help="Of the centers: float32 or bf16.")] = ["float32"],  # noqa: B006
    optimizer: Annotated[str, typer.Option(help="Of the centers: row_sgd or row_adagrad.")] = "row_sgd",
    dim: Annotated[int, typer.Option(min=1, help="Embedding dimension, D.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Samples of each rank in a step.")] = 64,
    precision: Annotated[str, typer.Option(help="Of the products: float32 or bf16.")] = "float32",
    objective: Annotated[str, typer.Option(help="See docs/objectives.md.")] = "cosface",
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process, on a CPU.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each line and round.")] = 3,
    warmup: Warmup = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often all lines are measured, one after the other.")] = 2,
    dense: Dense = True,
    peer: Peer = None,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="The most that a line's processes take together; else all that is free."),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Write scale.txt, scale.json, scale.png there.")] = Path(
        "scale"
    ),
) -> int:
    """Sweep classes, ranks and rates: throughput and memory of the head, until it no longer fits.

    Beside the plain dense head and, with --peer, the common implementation's, in the same run. What does not fit is a
    line of the table and a cross in the picture, and is not started. See docs/performance.md, "Scaling on one machine".
    """
    if rate and rows:
        raise UsageError("give --rate or --rows, not both")
    check_outputs(output)
    if storage_dir is not None and not storage_dir.is_dir():
        raise UsageError(f"--storage-dir {storage_dir}: no such folder")
    from ...benchmarks.scale.plot import plot
    from ...benchmarks.scale.sweep import Sweep, measure_sweep
    from ...benchmarks.scale.table import report
    from ..machine import default_ranks

    sweep = Sweep(
        classes=tuple(classes or Sweep.classes),
        rate=tuple(rate or Sweep.rate),
        rows=tuple(rows or ()),
        ranks=tuple(ranks or (() if simulate else [default_ranks()])),
        simulate=tuple(simulate or ()),
        storage=tuple(storage),
        storage_dir=str(storage_dir or output),
        center_dtype=tuple(center_dtype),
        optimizer=optimizer,
        dim=dim,
        batch=batch,
        precision=precision,
        objective=objective,
        threads=threads,
        steps=steps,
        warmup=warmup,
        rounds=rounds,
        dense=dense,
        peer="" if peer is None else str(peer),
        memory=memory,
    )
    sweep.check()
    output.mkdir(exist_ok=True)
    _tell_cores(max(sweep.ranks, default=1) * threads)
    with _progress() as tell:
        results = measure_sweep(sweep, tell)
    told = "\n".join(report(results)) + "\n"
    print(told, end="")
    (output / "scale.txt").write_text(told, encoding="utf-8")
    _write_json(output / "scale.json", results.to_dict())
    plot(results, output / "scale.png")
    return int(any(line.died for line in results.lines))


@app.command()
def step(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A run's configuration.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key.sub=value]...", help="Values in place of the file's: head.num_classes=1000000."),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ranks. [dim]\\[default: as pfc train][/dim]")
    ] = None,
    data: Annotated[bool, typer.Option("--data", help="Read the configured data set; else a made-up batch.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 5,
    warmup: Warmup = 2,
    dense: Dense = True,
    json_file: JsonFile = None,
) -> int:
    """Time the whole training step: images, backbone, head, backward, optimizers.

    It is the trainer's own step, on one made-up batch unless --data is given; without it head.num_classes may be any
    number. For comparison, in the same run and with the same backbone, the plain dense head.
    """
    check_outputs(json_file)
    from ...benchmarks.head.table import step_report
    from ...benchmarks.ranks import RankDied
    from ...benchmarks.step import completed, measure_step
    from ...engine.config import load_config
    from ..machine import default_ranks, usable_cores

    ranks = nproc or default_ranks()
    settings = completed(load_config(config, overrides), data)
    heads = ["pfc", "dense"] if dense else ["pfc"]
    threads = max(1, usable_cores() // ranks)
    figures, errors = [], []
    with _progress() as tell:
        for done, name in enumerate(heads):
            tell(done, len(heads), f"{name} head")
            try:
                figures.append(
                    measure_step(
                        settings, name, ranks=ranks, threads=threads, steps=steps, warmup=warmup, with_data=data
                    )
                )
            except RankDied as died:
                if died.wrong_use:
                    raise UsageError(str(died)) from None
                errors.append(f"{name} head: {died}")
    print("\n".join(step_report(settings, figures, ranks)))
    _write_json(
        json_file, {"config": settings.model_dump(), "ranks": ranks, "lines": [one.to_dict() for one in figures]}
    )
    for error in errors:
        warn(error)
    return int(bool(errors))


@app.command()
def search(
    gallery: Annotated[int, typer.Option(min=1, help="Rows that are searched.")] = 1_000_000,
    probes: Annotated[int, typer.Option(min=1, help="Rows that are searched for.")] = 20_000,
    dim: Annotated[int, typer.Option(min=1, help="Embedding dimension, D.")] = 512,
    memory: Annotated[int, typer.Option(min=1, metavar="MIB", help="To work in, besides the rows.")] = 512,
    json_file: JsonFile = None,
) -> None:
    """Time exact searches of a gallery: ranks of the mates, as evaluation needs them, and the nearest ten.

    Beside them the matrix products alone, and faiss's exact index where faiss is installed. Rows take 4·D bytes each.
    """
    check_outputs(json_file)
    if probes > gallery:
        raise UsageError(f"--probes {probes}: each has a mate of its own in the gallery, of {gallery} rows")
    from dataclasses import asdict

    from ...benchmarks.search import measure
    from ..console import print_table

    with _progress() as tell:
        found = measure(gallery, probes, dim, memory << 20, lambda what: tell(0, 1, what))
    rows = [(one.what, f"{one.seconds:.1f}", f"{one.ratio:.2f}", f"{one.peak >> 20:,}") for one in found]
    print_table(("search", "seconds", "x products", "MiB besides the rows"), rows)
    _write_json(json_file, {"lines": [asdict(one) for one in found]})


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """Yields a function of (done, total, what is measured now) that moves a bar on stderr; none without a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=what)


def _write_json(file: Path | None, figures: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _tell_cores(wanted: int) -> None:
    import torch

    from ..machine import usable_cores

    if not torch.accelerator.is_available() and wanted > usable_cores():
        warn(f"{wanted} threads on {usable_cores()} core(s): ranks will wait for each other; take fewer --ranks")
