"""What the tests of the fused kernels run in processes of their own, where Triton interprets its kernels on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from pfc.partial_fc import PartialFC, RowAdagrad, RowAdamW, RowOptimizer, RowSGD, device, objectives
from pfc.partial_fc.centers import ClassShard
from pfc.partial_fc.kernels import KernelSetup
from pfc.partial_fc.kernels.blocked import LogSumExpBlocked, SumOfSoftplusBlocked
from pfc.partial_fc.kernels.hard import HardNegatives
from pfc.partial_fc.kernels.probabilities import KeepBudget
from pfc.partial_fc.kernels.products import ComputeDtype
from pfc.partial_fc.kernels.rows import OwnClasses, SampledRows
from pfc.partial_fc.row_gradient import RowGradient, StepGradient, project
from pfc.partial_fc.sampling import sample_batch, sample_classes
from pfc.partial_fc.storage import Storage
from tests.partial_fc.cases import Case, StepResult, count_questions, step_on_rank

OPTIMIZERS = {
    "sgd": lambda head: RowSGD(head, 0.3),
    "momentum": lambda head: RowSGD(head, 0.3, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda head: RowSGD(head, 0.3, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda head: RowAdamW(head, 0.05, weight_decay=0.1),
    "adagrad": lambda head: RowAdagrad(head, 0.1, weight_decay=0.01),
    "of one's own": lambda head: _Plain(head, {}),
}


class _Plain(RowOptimizer):
    """One without a compiled pass, with a state of two axes."""

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"last": (2, self.head.embedding_dim)}

    def update(self, weight: Tensor, gradient: Tensor, state: list[Tensor]) -> None:
        state[0][:, 0] = gradient
        state[0][:, 1] += gradient
        weight -= 0.3 * gradient


@contextmanager
def on_gpu() -> Iterator[None]:
    """Inside, the head takes this device for a GPU, whose numbers the host does not see."""
    with patch.object(device, "runs_on", lambda _: True), patch.object(device, "host_sees", lambda _: False):
        yield


def step_fused(case: Case) -> StepResult:
    with on_gpu():
        return step_on_rank(case)


def same_samples() -> int:
    """The two ways of drawing give the same classes; returns how often a label was met that the draw had chosen."""
    met = 0
    generator = torch.Generator().manual_seed(0)
    for num_classes, world_size in ((1, 2), (4096, 1), (6145, 1), (6145, 2)):
        labels = torch.randint(0, num_classes, (100,), generator=generator)
        labels[1] = labels[0]
        for rank in range(world_size):
            shard = ClassShard.of(num_classes, rank, world_size)
            for rate, step in ((0.002, 0), (0.12, 1)):
                plain = sample_classes(labels, shard, rate=rate, seed=5, step=step)
                fixed = sample_classes(labels, shard, rate=rate, seed=5, step=step, fixed=True)
                assert torch.equal(fixed.classes, plain.classes)
                assert fixed.classes.dtype == torch.int64
                assert torch.equal(fixed.columns >= 0, plain.columns >= 0)
                here = fixed.columns >= 0
                assert fixed.rows is not None
                assert torch.equal(fixed.rows[fixed.columns[here]] + shard.start, labels[here])
                met += int((fixed.columns[here] < len(fixed.rows) - len(labels)).sum())
    return met


def same_batches() -> None:
    for size in (1, 30, 64, 1000):
        plain, fixed = (
            sample_batch(size, rate=0.4, seed=3, step=size, device=torch.device("cpu"), fixed=fixed)
            for fixed in (False, True)
        )
        assert plain is not None
        assert fixed is not None
        assert torch.equal(plain, fixed)


@dataclass(frozen=True)
class KernelCase:
    batch: int = 21
    rows: int = 150
    dim: int = 24
    stored: int = 200
    """Rows of the matrix; where it is no more than ``rows``, all are used and there is no index."""
    dtype: torch.dtype = torch.float32
    keep: bool = True
    hard: dict[str, float] = field(default_factory=dict)
    """Of ``HardNegatives.of``, with "threshold"; none where it is empty."""
    softplus: float = 0.0
    """The power of the sum of softplus; 0 for exponentials."""
    shift: float = -3.0
    scale: float = 64.0
    device: str = "cpu"


def operands(compute_dtype: ComputeDtype) -> tuple[Tensor, Tensor]:
    """Normalised rows [50, 24], and what the products take of them."""
    from pfc.partial_fc.kernels.fused.rows import normalized_rows

    weight = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    rows = SampledRows(weight, None)
    return torch.nn.functional.normalize(weight), normalized_rows(rows, 0, 50, 64, compute_dtype)[:50]


def fused_beside_plain(case: KernelCase) -> dict[str, tuple[Tensor, Tensor]]:
    """Each number of a step by both kernels; with an index the fused one gets padding too."""
    from pfc.partial_fc.kernels.fused.gradient import FusedGradient
    from pfc.partial_fc.kernels.fused.logsumexp import LogSumExpFused, SumOfSoftplusFused

    generator = torch.Generator().manual_seed(case.rows)
    unit = torch.nn.functional.normalize(torch.randn(case.batch, case.dim, generator=generator))
    weight = torch.randn(max(case.stored, case.rows), case.dim, generator=generator) * 0.1
    weight[3] = 0.0
    columns = torch.randint(-1, case.rows, (case.batch,), generator=generator)
    columns[:2], columns[2] = 0, -1  # a class twice, and one that lives elsewhere
    index = padded = None
    place = torch.arange(case.rows)
    if case.stored > case.rows:
        index = torch.randperm(case.stored, generator=generator)[: case.rows].sort().values
        place = place + place // 7 + 1  # a −1 before each seventh
        padded = torch.full((int(place[-1]) + 3,), -1)
        padded[place] = index
    budget = KeepBudget(1 << 30 if case.keep else 0)
    slope = torch.rand(case.batch, generator=generator, dtype=torch.float64)
    own = torch.randn(case.batch, case.dim, generator=generator)
    unit, weight, columns, slope, own, place = (
        tensor.to(case.device) for tensor in (unit, weight, columns, slope, own, place)
    )
    index, padded = (None if one is None else one.to(case.device) for one in (index, padded))
    pair: list[dict[str, Tensor]] = []
    for fused in (False, True):
        rows = SampledRows(weight.clone(), padded if fused else index)
        where = torch.where(columns >= 0, place[columns], -1) if fused else columns
        own_classes = OwnClasses(where)
        hard = None
        if case.hard:
            threshold, *coefficients = case.hard.items()
            spread = torch.linspace(-0.1, 0.1, case.batch, device=case.device) + threshold[1]
            hard = HardNegatives.of(spread, **dict(coefficients))
        compute = case.dtype if fused else torch.float32
        setup = KernelSetup(case.batch, case.dim, len(rows), compute, budget, hard)
        if case.softplus:
            shift = torch.tensor(case.shift, dtype=torch.float64)
            kernel = (SumOfSoftplusFused if fused else SumOfSoftplusBlocked)(setup, case.scale, case.softplus, shift)
        else:
            kernel = (LogSumExpFused if fused else LogSumExpBlocked)(setup, case.scale)
        total = kernel.finish(kernel.forward(unit, rows, own_classes, backward=True))
        unit_grad, negatives = kernel.backward(total, slope)
        gradient: RowGradient
        step = StepGradient(rows, negatives, own_classes, own[own_classes.samples])
        gradient = FusedGradient(negatives, where, own) if fused else step  # type: ignore[arg-type]
        chosen = weight if index is None else weight[index]
        assert gradient.index is None if index is None else torch.equal(gradient.index, index)
        assert gradient.inverse is not None
        parts = []
        for start in range(0, case.rows, 70):
            part = chosen[start : start + 70]
            raw = gradient.raw_block(start, start + len(part), part)
            parts.append(project(raw.clone(), part, gradient.inverse[start : start + 70]))
        row_grad = torch.cat(parts)
        pair.append({"total": total, "unit": unit_grad, "inverse": gradient.inverse, "rows": row_grad})
    return {name: (pair[1][name], pair[0][name]) for name in pair[0]}


def trained(
    name: str, fused: bool, rate: float, factor: float = 1.0, dim: int = 24, storage: Storage = "device"
) -> dict[str, Tensor]:
    """Centers and state after three steps, the second of them of two passes."""
    head = PartialFC(
        500,
        dim,
        objective=objectives.CosFace(),
        sample_rate=rate,
        storage=storage,
        row_state={"momentum": dim, "last": (2, dim)},
    )
    optimizer = OPTIMIZERS[name](head)
    with on_gpu() if fused else nullcontext():
        for step in range(3):
            for part in range(2 if step == 1 else 1):
                generator = torch.Generator().manual_seed(10 * step + part)
                embeddings = torch.randn(9, dim, generator=generator)
                labels = torch.randint(0, 500, (9,), generator=generator)
                labels[1] = labels[0]
                head(embeddings, labels).backward()
            if factor != 1.0:
                assert head.gradient_scale.grad is not None
                head.gradient_scale.grad *= factor  # as GradScaler.unscale_ does
            optimizer.step()
            optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    return {"centers": head.centers.to_local(), **{key: value.to_local() for key, value in state.items()}}


def broken_step(name: str, rate: float) -> bool:
    """Whether a step that is broken on the device alone leaves every bit; the same unbroken step does not."""
    changed = []
    head = PartialFC(500, 24, objective=objectives.CosFace(), sample_rate=rate)
    optimizer = OPTIMIZERS[name](head)
    with on_gpu():
        head(torch.randn(9, 24), torch.arange(9)).backward()
    tensors = [head.weight.data, *optimizer._row_state().values()]
    for broken in (True, False):
        before = [tensor.clone() for tensor in tensors]
        with torch.no_grad():
            head.row_gradients[0].apply([], tensors, optimizer, torch.ones(()), torch.tensor(broken))  # type: ignore[attr-defined]
        changed.append([not torch.equal(old, new) for old, new in zip(before, tensors, strict=True)])
    return not any(changed[0]) and all(changed[1])


def far_rows(folder: str) -> None:
    """A step on rows whose offsets go beyond 2³¹, in a file of holes: it reads and writes them, and no others."""
    from pfc.partial_fc.kernels.fused.gradient import FusedGradient
    from pfc.partial_fc.kernels.fused.logsumexp import LogSumExpFused

    dim, stored = 512, (1 << 22) + 100
    weight, momentum = (
        torch.from_file(str(Path(folder) / name), shared=True, size=stored * dim).view(stored, dim)
        for name in ("weight", "momentum")
    )
    index = torch.tensor([5, -1, 1 << 22, stored - 1])
    near = torch.randn(4, dim, generator=torch.Generator().manual_seed(0))
    weight[index[[0, 2, 3]]] = near[[0, 2, 3]]
    unit = torch.nn.functional.normalize(near + 1.0)
    results = []
    for matrix, speed, places in (
        (near.clone(), torch.zeros(4, dim), torch.tensor([0, -1, 2, 3])),
        (weight, momentum, index),
    ):
        setup = KernelSetup(4, dim, len(places), torch.float32, KeepBudget(1 << 20))
        kernel = LogSumExpFused(setup, 16.0)
        columns = torch.tensor([0, 3, -1, -1])
        total = kernel.finish(kernel.forward(unit, SampledRows(matrix, places), OwnClasses(columns), backward=True))
        _, negatives = kernel.backward(total, torch.ones(4, dtype=torch.float64))
        head = PartialFC(1, dim, objective=objectives.Softmax())
        gradient = FusedGradient(negatives, columns, unit)
        gradient.apply([], [matrix, speed], RowSGD(head, 0.1, 0.9), torch.ones(()), torch.tensor(False))
        used = places[places >= 0]
        results.append((total, matrix[used].clone(), speed[used].clone()))
    for here, far in zip(*results, strict=True):
        assert torch.equal(here, far)
    assert not torch.equal(results[1][1], near[[0, 2, 3]])


def accumulated(name: str, fused: bool, rate: float, keep_bytes: int, sum_numbers: int = 1) -> dict[str, Tensor]:
    """Centers and state after two steps of three passes each, whose rows are added in several parts."""
    from pfc.partial_fc.kernels.fused import gradient as fused_gradient

    classes = 4501 if rate < 1 else 901  # interpreting takes its time
    head = PartialFC(classes, 8, objective=objectives.CosFace(scale=16.0), sample_rate=rate, keep_bytes=keep_bytes)
    optimizer = OPTIMIZERS[name](head)
    generator = torch.Generator().manual_seed(0)
    with on_gpu() if fused else nullcontext(), patch.object(fused_gradient, "SUM_NUMBERS", sum_numbers):
        for _ in range(2):
            labels = torch.randint(0, classes, (7,), generator=generator)
            for _ in range(3):  # a class of one pass's batch is a random one of another's, or of its batch too
                head(torch.randn(9, 8, generator=generator), torch.cat([labels, labels[:2]])).backward()
                assert head.last_sample is not None
                labels[:3] = head.last_sample.classes[[3, 70, -1]]
            optimizer.step()
            optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    return {"centers": head.weight.detach(), **{key: value.to_local() for key, value in state.items()}}


def questions_of_steps(name: str, rate: float, passes: int) -> list[int]:
    """How often each of two steps with the fused kernels asks something of the device."""
    classes = 4501 if rate < 1 else 901
    head = PartialFC(classes, 8, objective=objectives.CosFace(), sample_rate=rate)
    optimizer = OPTIMIZERS[name](head)
    batches = [(torch.randn(9, 8, requires_grad=True), torch.randint(0, classes, (9,))) for _ in range(passes)]
    return [count_questions(lambda: _step(head, optimizer, batches)) for _ in range(2)]


def _step(head: PartialFC, optimizer: RowOptimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    with on_gpu():
        for embeddings, labels in batches:
            (head(embeddings, labels) / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
