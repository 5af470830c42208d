"""One plan whole; the largest number of identities and the largest rate that fit; options side by side; advice."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from ...partial_fc import RowAdagrad, RowAdamW, RowSGD
from .backbone import BackboneCost
from .machine import GB, Machine
from .memory import Memory, plan_memory
from .setup import Setup
from .timing import STORAGE, StepTime, step_time
from .traffic import Collective, Transfer, collectives, transfer

_MOST_CLASSES = 10**11
_STATES: dict[str, Callable[[int], dict[str, int]]] = {
    "row_sgd, momentum": lambda dim: RowSGD.row_state(dim, 0.9),
    "row_sgd, momentum 0": RowSGD.row_state,
    "row_adagrad": RowAdagrad.row_state,
    "row_adamw": RowAdamW.row_state,
}


@dataclass(frozen=True)
class Plan:
    """What a setup takes on a machine; computed when asked for.

    Attributes:
        precision: of the backbone.
        halved: whether its gradients travel in bfloat16; copied: whether checkpoints are copied into host memory.
    """

    setup: Setup
    machine: Machine
    backbone: BackboneCost
    precision: str = "float32"
    halved: bool = False
    copied: bool = False

    def of(self, **changes: object) -> "Plan":
        """The same with another setup."""
        return replace(self, setup=replace(self.setup, **changes))

    @cached_property
    def memory(self) -> Memory:
        return plan_memory(self.setup, self.machine, self.backbone, copied=self.copied)

    @cached_property
    def collectives(self) -> list[Collective]:
        return collectives(self.setup, self.machine, self.backbone, halved=self.halved)

    @cached_property
    def transfer(self) -> Transfer:
        return transfer(self.setup, self.machine, self.memory.host)

    @cached_property
    def time(self) -> StepTime:
        return step_time(self.setup, self.machine, self.backbone, self.collectives, self.transfer, self.precision)

    @property
    def fits(self) -> bool:
        return self.memory.fits(self.machine, self.ranks_here)

    @property
    def ranks_here(self) -> int:
        """Ranks of one machine."""
        return self.machine.ranks_here(self.setup.ranks)

    @property
    def images_per_second(self) -> float:
        return self.setup.global_batch * self.setup.accumulate / self.time.seconds


def largest_classes(plan: Plan) -> int:
    """The largest C that fits with all else as it is; 0 where none does."""
    return _largest(lambda classes: plan.of(classes=classes), 1, _MOST_CLASSES)


def largest_rate(plan: Plan) -> float:
    """The largest rate that fits with all else as it is, to a millionth; 0 where none does."""
    if plan.of(rate=1.0).fits:  # at which no rows are copied
        return 1.0
    return _largest(lambda millionths: plan.of(rate=millionths / 10**6), 1, 10**6 - 1) / 10**6


def _largest(make: Callable[[int], Plan], low: int, high: int) -> int:
    """The largest number in [low, high] whose plan fits; 0 for none.

    More needs more, except that probabilities which have become too many to be kept take nothing: so from where that
    happens on, which is searched for first, and then below.
    """
    edges = [low, high + 1]
    first, last = make(low), make(high)
    for passes in range(first.setup.kept_passes(first.machine), last.setup.kept_passes(last.machine), -1):
        edges.append(_first(lambda n: make(n).setup.kept_passes(make(n).machine) < passes, low, high))  # noqa: B023
    edges.sort()
    for start, stop in reversed(list(pairwise(edges))):
        if start < stop and make(start).fits:
            return _first(lambda n: not make(n).fits, start, stop) - 1
    return 0


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The first number in [low, high) of which it holds, as it does of all after it; ``high`` where of none."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


@dataclass(frozen=True)
class Option:
    """One way to store centers and state."""

    storage: str
    center_dtype: str
    optimizer: str
    plan: Plan
    largest: int


def options(plan: Plan) -> list[Option]:
    """Every storage and dtype, with the optimizer that is set and with the one that keeps least beside the centers."""
    dim = plan.setup.dim
    own = next((name for name, state in _STATES.items() if state(dim) == plan.setup.state), "as set")
    states = {own: dict(plan.setup.state), "row_adagrad": RowAdagrad.row_state(dim)}
    found = []
    for storage in ("device", "host", "file"):
        for dtype in ("float32", "bf16"):
            for name, state in states.items():
                one = plan.of(storage=storage, center_dtype=dtype, state=state)
                found.append(Option(storage, dtype, name, one, largest_classes(one)))
    return found


def advice(plan: Plan, ways: list[Option]) -> list[str]:
    """What to do about it, in plain words; each line with its numbers."""
    setup, machine, said = plan.setup, plan.machine, []
    if not plan.fits:
        said.append(_lack(plan))
        good = sorted((way for way in ways if way.plan.fits), key=lambda way: way.plan.time.seconds)
        said += [f"fits, the fastest: {_named(way)} ({_figures(way.plan)})" for way in good[:3]]
        if (rate := largest_rate(plan)) > 0:
            said.append(f"fits with head.sample_rate={rate:.6g} ({_figures(plan.of(rate=rate))})")
        ranks = next((2**n for n in range(11) if 2**n > setup.ranks and plan.of(ranks=2**n).fits), None)
        if ranks:
            said.append(f"fits on {ranks} ranks ({_figures(plan.of(ranks=ranks))})")
        if len(said) == 1:
            said.append("no storage, dtype or rate makes it fit: take a smaller batch, or a smaller embedding_dim")
        return said
    on_device = plan.of(storage="device")
    if setup.storage != "device" and on_device.fits:
        said.append(f"head.storage=device fits too: {_figures(on_device)}, here {_figures(plan)}")
    moved = plan.transfer.seconds
    rest = _rest(plan)
    if machine.gpu and _waits(plan):
        hidden = _first(lambda millionths: _waits(plan.of(rate=millionths / 10**6)), 1, 10**6) - 1
        said.append(
            f"the step waits for rows from storage: {1e3 * moved:,.0f} ms, all else {1e3 * rest:,.0f} ms; up to "
            f"head.sample_rate={hidden / 10**6:.3g} it would not"
        )
    if setup.rate == 1 and plan.time.of("head", "row update") > 0.5 * plan.time.seconds:
        said.append(f"most of the step is the head: head.sample_rate=0.1 gives {_figures(plan.of(rate=0.1))}")
    if setup.reduction == "blocks" and setup.kept_passes(machine) < setup.accumulate:
        size = setup.accumulate * setup.probability_bytes(machine)
        kept = plan.of(keep=size)
        if kept.fits:
            said.append(f"head.keep_mib={-(-size >> 20)} would keep the probabilities: {_figures(kept)}")
    if machine.gpu and setup.products == "float32" and "bf16" in machine.products:
        said.append(f"head.products=bf16 gives {_figures(plan.of(products='bf16'))}")
    if setup.center_dtype == "float32" and largest_classes(plan) < 2 * setup.classes:
        more = largest_classes(plan.of(center_dtype="bf16"))
        said.append(f"head.center_dtype=bf16 would make room for {more:,} identities")
    return said or ["nothing to change"]


def _waits(plan: Plan) -> bool:
    return plan.transfer.seconds > _rest(plan)


def _rest(plan: Plan) -> float:
    """Seconds of a step without what is moved to and from storage."""
    return StepTime(tuple(phase for phase in plan.time.phases if phase.name != STORAGE)).seconds


def _lack(plan: Plan) -> str:
    """What does not fit."""
    machine, memory = plan.machine, plan.memory
    if machine.gpu and memory.device > machine.memory:
        return f"does not fit: {memory.device / GB:,.1f} GB of a GPU's {machine.memory / GB:,.1f} GB"
    if memory.disk * plan.ranks_here > machine.disk_space:
        here = memory.disk * plan.ranks_here
        return f"does not fit: {here / GB:,.1f} GB of the {machine.disk_space / GB:,.1f} GB that the disk has"
    here = memory.host * plan.ranks_here
    return f"does not fit: {here / GB:,.1f} GB of the {machine.host_memory / GB:,.1f} GB of a machine's memory"


def _named(way: Option) -> str:
    return f"head.storage={way.storage} head.center_dtype={way.center_dtype}, {way.optimizer}"


def _figures(plan: Plan) -> str:
    memory, machine = plan.memory, plan.machine
    taken = f"{memory.device / GB:,.1f} GB a GPU" if machine.gpu else f"{memory.host / GB:,.1f} GB a rank"
    return f"{taken}, {1e3 * plan.time.seconds:,.0f} ms a step"
