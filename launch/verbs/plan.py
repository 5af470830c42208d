"""``pfc plan``: what a configuration needs, how fast it can be, and what would fit, before anything is trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...data.errors import UsageError
from ..console import check_outputs, print_table, warn

if TYPE_CHECKING:
    from ...engine.config import Config
    from ...engine.plan.machine import Machine


def plan(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG.yaml", help="The run's configuration; --verify needs none.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key.sub=value]...", help="Values in place of the file's: head.storage=host."),
    ] = None,
    world: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Ranks. [dim]\\[default: as pfc train here; with --card 8][/dim]"),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="C", help="Identities. [dim]\\[default: the configuration's or the data set's][/dim]"
        ),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Plan for machines of this GPU: v100-32, a100-40, a100-80, h100-80, h200, rtx-4090, l40s. "
            "[dim]\\[default: this machine, measured][/dim]",
        ),
    ] = None,
    per_machine: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ranks of a machine. [dim]\\[default: 8, or all here][/dim]")
    ] = None,
    gpu_memory: Annotated[float | None, typer.Option(min=0.1, metavar="GB", help="Of each GPU, in 10⁹ bytes.")] = None,
    host_memory: Annotated[float | None, typer.Option(min=0.1, metavar="GB", help="Of each machine.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=0.001, metavar="GB/s", help="Of each GPU's, or rank's, memory.")
    ] = None,
    host_link: Annotated[
        float | None, typer.Option(min=0.001, metavar="GB/s", help="Between a GPU and the host's memory, each way.")
    ] = None,
    host_copy: Annotated[
        float | None, typer.Option(min=0.001, metavar="GB/s", help="Of rows that the host copies for a rank.")
    ] = None,
    network: Annotated[
        float | None, typer.Option(min=0.001, metavar="GB/s", help="Between machines, for each rank, each way.")
    ] = None,
    disk: Annotated[float | None, typer.Option(min=0.001, metavar="GB/s", help="Of a machine's local disk.")] = None,
    disk_space: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="GB", help="Free there. [dim]\\[default: what is free here; no limit][/dim]"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run real steps here, and compare them with what is predicted for them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan, or what --verify found, as JSON.")] = False,
    picture: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw memory and time over ranks, for 10⁶ to 10⁹ identities."),
    ] = None,
) -> int:
    """Predict memory by part, exchanged bytes and the time of a step; say what fits and what would.

    Neither the data set nor a GPU has to be here, and nothing is trained. Exits with 1 where the configuration does not
    fit, or where --verify finds a prediction of memory off by more than 10 % or one of time by more than a factor of 2.
    docs/scaling.md explains the model.
    """
    if verify:
        return _verify(as_json)
    if config is None:
        raise UsageError("give a configuration, or --verify")
    check_outputs(picture=picture)
    from ...engine.config import load_config
    from ...engine.plan.backbone import dry_run
    from ...engine.plan.limits import Plan
    from ...engine.plan.report import Report, plot
    from ...engine.plan.setup import Setup, completed

    settings, assumed = completed(load_config(config, overrides), classes)
    given = {
        "memory": gpu_memory,
        "host_memory": host_memory,
        "bandwidth": bandwidth,
        "host_link": host_link,
        "host_copy": host_copy,
        "network": network,
        "disk": disk,
        "disk_space": disk_space,
    }
    machine, ranks = _machine(card, world, settings)
    setup = Setup.of(settings, ranks)
    changes = {name: 1e9 * value for name, value in given.items() if value is not None}
    if bandwidth is not None:
        changes["scattered"] = 1e9 * bandwidth
    if gpu_memory is not None and not machine.gpu:
        raise UsageError("--gpu-memory: there is no GPU here; say which with --card")
    machine = replace(machine, **changes)
    if per_machine is not None:
        machine = replace(machine, per_node=per_machine)
    height, width = settings.data.image_size or (0, 0)
    made = Plan(
        setup,
        machine,
        dry_run(settings, (height, width)),
        precision=settings.precision,
        halved=settings.backbone.payload_dtype == "bf16",
        copied=settings.checkpoint.asynchronous,
    )
    report = Report.of(made, assumed)
    if picture is not None:
        plot(made, picture)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print("\n".join(report.first_lines()))
        for table in report.tables():
            print(f"\n{table.heading}")
            print_table(table.titles, table.rows)
        print()
        print("\n".join(report.last_lines()))
    return 0 if made.fits else 1


def _machine(card: str | None, world: int | None, config: "Config") -> "tuple[Machine, int]":
    """The machine that is asked for, and how many ranks."""
    if card is not None:
        from ...engine.plan.machine import card_machine

        return card_machine(card), world or 8
    from ...benchmarks.plan.here import machine_here
    from ..machine import default_ranks, usable_cores

    here = default_ranks()
    ranks = world or here
    at_work = min(ranks, here)
    machine = machine_here(at_work, config.backbone.embedding_dim, max(1, usable_cores() // at_work))
    folder = Path(config.head.storage_dir or config.run.path).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    return replace(machine, disk_space=shutil.disk_usage(there).free), ranks


def _verify(as_json: bool) -> int:
    from ...benchmarks.plan.verify import verify

    def tell(done: int, total: int, case: str) -> None:
        warn(f"{done + 1}/{total} {case}")

    checks = list(verify(tell))
    if as_json:
        print(json.dumps([check.to_dict() for check in checks], indent=2))
    else:
        titles = [
            "configuration",
            "MB predicted",
            "measured",
            "ratio",
            "ms predicted",
            "measured",
            "ratio",
            "by the clock",
            "",
        ]
        rows = [
            [
                str(check.case),
                f"{check.memory / 1e6:,.0f}",
                f"{check.measured_memory / 1e6:,.0f}",
                f"{check.memory_ratio:.3f}",
                f"{1e3 * check.seconds:,.0f}",
                f"{1e3 * check.measured_seconds:,.0f}",
                f"{check.time_ratio:.2f}",
                f"{1e3 * check.clock_seconds:,.0f}",
                "" if check.good else "OFF",
            ]
            for check in checks
        ]
        print_table(titles, rows)
    return 0 if all(check.good for check in checks) else 1
