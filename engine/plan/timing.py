"""Seconds of a step by phase: a roofline of operations and bytes at the machine's ceilings."""

from dataclasses import dataclass

from .backbone import BackboneCost
from .machine import Machine
from .setup import ITEM, Setup
from .traffic import Collective, Transfer

STORAGE = "rows to and from storage"
"""The name of that phase."""


@dataclass(frozen=True)
class Phase:
    """One part of a step on a rank.

    Attributes:
        flops: of its matrix products and convolutions.
        bytes: to and from the rank's memory; of an exchange, sent to other ranks; of storage, over the link.
        seconds: that it takes.
        beside: whether it runs while the phases before it do, and counts only where it takes longer than they.
    """

    name: str
    flops: float
    bytes: float
    seconds: float
    beside: bool = False


@dataclass(frozen=True)
class StepTime:
    """The phases in their order."""

    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        """Of the step: its phases one after the other; those beside them take longer, or no time at all."""
        alone = sum(phase.seconds for phase in self.phases if not phase.beside)
        return max([alone, *(phase.seconds for phase in self.phases if phase.beside)])

    def of(self, *names: str) -> float:
        """Seconds of the phases whose names begin so."""
        return sum(phase.seconds for phase in self.phases if phase.name.startswith(names))


def head_phases(setup: Setup, machine: Machine) -> list[Phase]:
    """The head's own two walks over the rows, for a step with all its micro-batches."""
    rows, batch, dim, passes = setup.rows, setup.batch_rate * setup.global_batch, setup.dim, setup.accumulate
    kept = setup.kept_passes(machine)
    product = 2 * batch * rows * dim
    probabilities, width = setup.probability_bytes(machine), setup.operand(machine)
    read = rows * setup.center_bytes
    stepped = 2 * setup.stepped_rows * setup.row_bytes
    forward, forward_moved = 2 * passes * product, passes * read + kept * probabilities
    update, update_moved = passes * product, stepped + kept * probabilities
    if setup.nearest:  # are looked for in a walk of their own
        forward, forward_moved = forward + passes * product, forward_moved + passes * read
    if setup.reduction == "gram":
        forward = update = passes * 2 * rows * dim**2
        forward_moved, update_moved = passes * read, stepped
    elif setup.reduction == "cosines":  # all at once: normalised rows, cosines, their exponentials and slopes
        whole = passes * (2 * rows * dim * (width + 4) + 8 * 4 * batch * rows)
        forward_moved, update_moved = passes * read + whole, stepped + passes * 4 * batch * rows
    else:
        again = passes - kept
        update += again * product
        update_moved += again * read
    if machine.gpu and setup.reduction == "blocks" and not setup.fused(machine):
        # torch's own operations: each walks through all rows, or all probabilities, in float32
        wide = 1 + sum(width > 1 for width in setup.state.values())
        forward_moved += passes * (3 * 4 * rows * dim + 8 * 4 * batch * rows)
        update_moved += (7 * wide + 15) * 4 * setup.stepped_rows * dim
    elif machine.gpu:  # rows as operands, written and read twice; slopes of float32, written and read
        forward_moved += passes * rows * dim * 3 * width
        update_moved += passes * rows * dim * 8
    exponentials = 0.0 if setup.reduction == "gram" else machine.exponential * batch * rows
    numbers = setup.stepped_rows * (setup.center_bytes + setup.wide_state_bytes) / ITEM[setup.center_dtype]
    rounding = machine.rounding * numbers if setup.center_dtype == "bf16" else 0.0
    walks = [("head forward", forward, forward_moved, passes * exponentials)]
    walks.append(("row update", update, update_moved, (passes - kept) * exponentials + rounding))
    return [
        Phase(name, flops, moved, _roofline(setup, machine, flops, moved) + besides)
        for name, flops, moved, besides in walks
    ]


def _roofline(setup: Setup, machine: Machine, flops: float, moved: float) -> float:
    """On a GPU memory is read while products are made; a core of a CPU does one after the other."""
    products = flops / _rate(machine, setup.products if machine.gpu else "float32")
    memory = moved / (machine.bandwidth if setup.rate == 1 else machine.scattered)
    return max(products, memory) if machine.gpu else products + memory


def _rate(machine: Machine, precision: str) -> float:
    """Of products in that precision, or where the machine has none of its own, in float32."""
    return machine.products.get(precision, machine.products["float32"])


def step_time(
    setup: Setup,
    machine: Machine,
    backbone: BackboneCost,
    exchanges: list[Collective],
    moved: Transfer,
    precision: str,
) -> StepTime:
    """That of a training step; the loader's work is not in it.

    Args:
        precision: of the backbone.
    """
    passes = setup.accumulate
    rate = _rate(machine, precision if machine.gpu else "float32")
    once = backbone.seconds(machine.convolutions or rate, machine.elementwise or machine.bandwidth)
    flops = backbone.flops
    touched = sum(size * count for (_, size), count in backbone.operations.items())
    gather, numbers, *before, scatter, gradients = exchanges
    forward, update = head_phases(setup, machine)
    again = backbone.backward
    backward = again * passes * once
    optimizer = 3 * backbone.parameters + 2 * backbone.state
    phases = [
        Phase("backbone forward", passes * flops, passes * touched, passes * once),
        Phase("gather embeddings", 0, gather.sent * passes, gather.seconds),
        forward,
        Phase("sum the samples' numbers", 0, numbers.sent * passes, numbers.seconds),
        *(Phase(one.name, 0, one.sent * passes, one.seconds) for one in before),
        Phase("scatter gradients", 0, scatter.sent * passes, scatter.seconds),
        Phase("backbone backward", again * passes * flops, again * passes * touched, backward),
        # In buckets, as the last backward pass goes on.
        Phase("rest of the backbone's exchange", 0, gradients.sent, max(0.0, gradients.seconds - again * once)),
        Phase("backbone optimizer", 0, optimizer, optimizer / machine.bandwidth),
        update,
    ]
    operations = (1 + again) * passes * sum(backbone.operations.values())
    if machine.gpu:
        launched = machine.overhead * passes + operations * machine.launch
        phases.append(Phase("launches on the host", 0, 0, launched, beside=True))
    else:
        phases.append(Phase("overhead of the head", 0, 0, machine.overhead * passes))
    if setup.storage != "device":
        total = moved.fetched + moved.written
        phases.append(Phase(STORAGE, 0, total, moved.seconds, beside=machine.gpu))
    return StepTime(tuple(phases))
