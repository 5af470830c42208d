"""A plan as tables, as JSON and as a picture."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .limits import Option, Plan, advice, largest_classes, largest_rate, options
from .machine import GB

RANKS = tuple(2**power for power in range(11))
CLASSES = (10**6, 10**7, 10**8, 10**9)


@dataclass(frozen=True)
class Table:
    """Lines below a heading; the first column is a name."""

    heading: str
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Report:
    """A plan with what follows from it.

    Attributes:
        assumed: what the configuration does not say, in words.
    """

    plan: Plan
    options: list[Option]
    classes: int
    rate: float
    advice: list[str]
    assumed: list[str]

    @classmethod
    def of(cls, plan: Plan, assumed: list[str]) -> "Report":
        ways = options(plan)
        return cls(plan, ways, largest_classes(plan), largest_rate(plan), advice(plan, ways), assumed)

    def first_lines(self) -> list[str]:
        """What is planned, and on what."""
        setup, machine = self.plan.setup, self.plan.machine
        each = f"{machine.memory / GB:,.1f} GB each, " if machine.gpu else ""
        products = ", ".join(f"{name} {rate / 1e12:,.3g}" for name, rate in machine.products.items())
        return [
            f"{setup.classes:,} identities, D = {setup.dim}, rate {setup.rate:g}: {setup.shard:,} centers a rank, "
            f"{setup.rows:,.0f} of them in a step; {setup.global_batch * setup.accumulate:,} images a step",
            f"storage {setup.storage}, {setup.center_dtype}, products in {setup.products}; backbone in "
            f"{self.plan.precision}",
            f"{setup.ranks} rank(s), {self.plan.ranks_here} on a machine: {machine.name}, {each}"
            f"{machine.host_memory / GB:,.0f} GB a machine; TFLOP/s {products}; {machine.bandwidth / GB:,.4g} GB/s",
            *(f"assumed: {line}" for line in self.assumed),
        ]

    def last_lines(self) -> list[str]:
        """What it comes to, and advice."""
        plan = self.plan
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        rate = f"a rate of {self.rate:g}" if self.rate else "no rate"
        most = f"{self.classes:,} identities at this rate, and {rate} with these identities"
        return [
            f"{verdict}; {1e3 * plan.time.seconds:,.1f} ms a step, {plan.images_per_second:,.0f} images/s at best",
            f"at most: {most}" if self.classes else "at most: not even one identity",
            *(f"→ {line}" for line in self.advice),
        ]

    def tables(self) -> list[Table]:
        plan = self.plan
        ranks, memory = plan.setup.ranks, plan.memory
        places = ["device", "host", "disk"] if plan.machine.gpu else ["host", "disk"]
        parts = [*memory.parts, memory]
        names = [*(part.name for part in memory.parts), "together"]
        stored = [
            [name, *(_gb(getattr(part, place)) for place in places), _gb(ranks * (part.device + part.host + part.disk))]
            for name, part in zip(names, parts, strict=True)
        ]
        sent = [
            [one.name, one.kind, str(one.times), _mb(one.bytes), _mb(one.sent * one.times), _ms(one.seconds)]
            for one in plan.collectives
        ]
        phases = [
            [
                one.name + (" (beside)" if one.beside else ""),
                f"{one.flops / 1e9:,.1f}",
                _mb(one.bytes),
                _ms(one.seconds),
            ]
            for one in plan.time.phases
        ]
        phases.append(["step", "", "", _ms(plan.time.seconds)])
        ways = [
            [
                f"{way.storage}, {way.center_dtype}, {way.optimizer}",
                _gb(way.plan.memory.device if plan.machine.gpu else way.plan.memory.host),
                _gb(way.plan.memory.host * plan.ranks_here),
                _gb(way.plan.memory.disk * plan.ranks_here),
                "yes" if way.plan.fits else "no",
                f"{way.largest:,}",
                _ms(way.plan.time.seconds),
            ]
            for way in self.options
        ]
        return [
            Table("memory of a rank, GB", ["part", *places, "all ranks"], stored),
            Table("exchange in a step", ["tensor", "collective", "times", "MB", "MB sent a rank", "ms"], sent),
            Table("time of a step", ["phase", "GFLOP", "MB", "ms"], phases),
            Table(
                "ways to store the centers",
                ["storage, dtype, optimizer", "GB a rank", "host GB", "disk GB", "fits", "at most", "ms/step"],
                ways,
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        plan = self.plan
        setup, memory = plan.setup, plan.memory
        figures = ("device", "host", "disk")
        return {
            "setup": {
                **asdict(setup),
                "global_batch": setup.global_batch,
                "centers_per_rank": setup.shard,
                "rows_per_step": setup.rows,
            },
            "machine": plan.machine.to_dict(),
            "assumed": self.assumed,
            "memory": {
                "per_rank": {part.name: {place: getattr(part, place) for place in figures} for part in memory.parts},
                "per_rank_total": {place: getattr(memory, place) for place in figures},
                "all_ranks_total": {place: setup.ranks * getattr(memory, place) for place in figures},
            },
            "collectives": [asdict(one) for one in plan.collectives],
            "storage": asdict(plan.transfer),
            "phases": [asdict(one) for one in plan.time.phases],
            "step_seconds": plan.time.seconds,
            "images_per_second": plan.images_per_second,
            "fits": plan.fits,
            "largest_classes": self.classes,
            "largest_rate": self.rate,
            "options": [
                {
                    "storage": way.storage,
                    "center_dtype": way.center_dtype,
                    "optimizer": way.optimizer,
                    "device_bytes": way.plan.memory.device,
                    "host_bytes_per_machine": way.plan.memory.host * plan.ranks_here,
                    "disk_bytes_per_machine": way.plan.memory.disk * plan.ranks_here,
                    "fits": way.plan.fits,
                    "largest_classes": way.largest,
                    "step_seconds": way.plan.time.seconds,
                }
                for way in self.options
            ],
            "advice": self.advice,
        }


def plot(plan: Plan, file: Path) -> None:
    """Memory of a rank and time of a step over 1 to 1024 ranks, for 10⁶ to 10⁹ identities; dots where it fits."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    machine = plan.machine
    for classes in CLASSES:
        plans = [plan.of(classes=classes, ranks=ranks) for ranks in RANKS]
        memory = [(one.memory.device if machine.gpu else one.memory.host) / GB for one in plans]
        seconds = [1e3 * one.time.seconds for one in plans]
        there = [place for place, one in enumerate(plans) if one.fits]
        for axis, values in ((left, memory), (right, seconds)):
            (line,) = axis.plot(RANKS, values, label=f"{classes:,} identities", linewidth=1.2)
            axis.plot(*_points(RANKS, values, there), "o", color=line.get_color())
    if machine.gpu:
        left.axhline(machine.memory / GB, color="black", linewidth=0.8)
        left.text(1, machine.memory / GB, f" {machine.name}", va="bottom", fontsize=9)
    left.set_ylabel("GB a GPU" if machine.gpu else "GB a rank")
    right.set_ylabel("ms a step")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        for side in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            side(FuncFormatter(_tick))
        axis.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
        axis.set_xlabel("ranks")
        axis.grid(color="#e4e4e4", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    setup = plan.setup
    figure.suptitle(
        f"{machine.name}: D = {setup.dim}, rate {setup.rate:g}, {setup.batch} images a rank, storage {setup.storage}, "
        f"{setup.center_dtype}; a dot where it fits",
        fontsize=11,
    )
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(file, dpi=150)


def _points(xs: Sequence[float], ys: Sequence[float], places: Iterable[int]) -> tuple[list[float], list[float]]:
    chosen = list(places)
    return [xs[place] for place in chosen], [ys[place] for place in chosen]


def _tick(value: float, _: int) -> str:
    """Powers of ten with their doubles and fives, so that labels do not run into each other."""
    digits = f"{value:e}"
    return f"{value:,.10g}" if digits[0] in "125" and not digits[2:8].strip("0") else ""


def _gb(size: float) -> str:
    return f"{size / GB:,.2f}" if size else ""


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size else ""


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"
