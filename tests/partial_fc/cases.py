"""One step of the head on real ranks, compared with the oracle."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pfc.partial_fc import PartialFC, objectives
from pfc.partial_fc.kernels.products import ComputeDtype
from pfc.partial_fc.kernels.rows import computed_dtype
from pfc.partial_fc.objectives.state import ObjectiveState
from pfc.partial_fc.row_gradient import finished_block
from pfc.partial_fc.storage import Storage
from tests.partial_fc.oracle import dense_loss
from tests.ranks import run_ranks

OBJECTIVES: dict[str, dict[str, float]] = {
    "softmax": {"scale": 30.0},
    "cosface": {"scale": 64.0, "margin": 0.35},
    "arcface": {"scale": 64.0, "margin": 0.5},
    "sphereface": {"scale": 32.0, "margin": 1.7},
    "combined": {"scale": 48.0, "m1": 1.2, "m2": 0.3, "m3": 0.15},
    "d_softmax": {"scale": 32.0, "stop": 0.9},
    "p2sgrad": {},
}
SETTINGS: dict[str, tuple[str, dict[str, float]]] = {
    **{name: (name, parameters) for name, parameters in OBJECTIVES.items()},
    "combined (1, 0.3, 0.2)": ("combined", {"scale": 64.0, "m1": 1.0, "m2": 0.3, "m3": 0.2}),
    "combined (0.9, 0.4, 0.15)": ("combined", {"scale": 64.0, "m1": 0.9, "m2": 0.4, "m3": 0.15}),
}
"""What the tests call it → objective and parameters; the last two are the combinations of ArcFace's own paper."""
SEEING: dict[str, tuple[str, dict[str, float]]] = {
    "adaface": ("adaface", {"scale": 64.0, "margin": 0.4, "concentration": 4.0, "momentum": 0.6}),
    "magface": (
        "magface",
        {
            "scale": 32.0,
            "least_norm": 12.0,
            "most_norm": 15.0,
            "least_margin": 0.3,
            "most_margin": 0.8,
            "regularizer": 35,
        },
    ),
    "elastic_arcface": ("elastic_arcface", {"scale": 64.0, "margin": 0.5, "deviation": 0.05, "plus": False}),
    "elastic_arcface+": ("elastic_arcface", {"scale": 64.0, "margin": 0.5, "deviation": 0.0175, "plus": True}),
    "elastic_cosface": ("elastic_cosface", {"scale": 64.0, "margin": 0.35, "deviation": 0.05, "plus": False}),
    "elastic_cosface+": ("elastic_cosface", {"scale": 64.0, "margin": 0.35, "deviation": 0.02, "plus": True}),
    "curricularface": ("curricularface", {"scale": 64.0, "margin": 0.5, "momentum": 0.7}),
    "mv_softmax, adaptive": (
        "mv_softmax",
        {"scale": 64.0, "m1": 1.0, "m2": 0.0, "m3": 0.35, "t": 0.2, "adaptive": True},
    ),
    "mv_softmax, fixed": ("mv_softmax", {"scale": 48.0, "m1": 1.0, "m2": 0.5, "m3": 0.0, "t": 0.2, "adaptive": False}),
    "inter_top_k": ("inter_top_k", {"scale": 32.0, "margin": 0.2, "top_k": 5, "hard_margin": 0.06}),
    "sphereface2": ("sphereface2", {"scale": 40.0, "margin": 0.4, "power": 3.0, "balance": 0.7}),
    "uniface": ("uniface", {"scale": 64.0, "margin": 0.4, "balance": 0.7}),
}
"""Those that see more than two numbers, or change their negatives, or sum something else."""


@dataclass(frozen=True)
class Case:
    objective: str
    parameters: dict[str, float] = field(default_factory=dict)
    num_classes: int = 103
    dim: int = 24
    batch: int = 5
    """Samples per rank."""
    labels: str = "random"
    """"random", "same" (all of one class), "low" (all on the first rank's shard)."""
    sample_rate: float = 1.0
    batch_rate: float = 1.0
    dtype: torch.dtype = torch.float32
    seed: int = 0
    keep_bytes: int = 1 << 30
    compute_dtype: ComputeDtype | None = None
    device: str = "cpu"
    stored: torch.dtype | None = None
    """The centers' dtype where it is another than that of the computations."""
    storage: Storage = "device"
    sub_centers: int = 1
    weighted: bool = False
    """Whether the classes have weights."""
    surroundings: torch.dtype | None = None
    """Autocast's dtype around the head, whose labels then are a column of a matrix."""


WORLDS = (1, 2, 3)
RATES = ((1.0, 1.0), (0.3, 1.0), (1.0, 0.5), (0.3, 0.5))
SHAPES: dict[str, dict[str, Any]] = {
    "does not divide": {},
    "fewer classes than ranks": {"num_classes": 2},
    "one class": {"num_classes": 1},
    "a batch of one": {"batch": 1},
    "one class twice and more": {"labels": "same"},
    "a rank without positives": {"labels": "low"},
    "more positives than the sample": {"num_classes": 40, "batch": 30},
    "several sampling blocks": {"num_classes": 9001, "dim": 8},
}
SHAPES_AND_RATES: list[dict[str, Any]] = [
    {"sample_rate": sample_rate, "batch_rate": batch_rate, **shape}
    for shape in SHAPES.values()
    for sample_rate, batch_rate in RATES
]
"""Sizes that do not divide, and unusual ones, at every pair of rates."""


@dataclass
class StepResult:
    """What one rank made of a step."""

    loss: Tensor
    embedding_grad: Tensor
    row_grad: Tensor
    classes: Tensor
    sampled_batch: Tensor
    learned_grad: Tensor
    """By what the objective learns, [n]."""


def tensors(case: Case, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, D], labels [B] and centers [C, D] (or [C, S, D]) of the whole world, float64, of values that
    float32 can hold."""
    generator = torch.Generator().manual_seed(case.seed)
    size = world_size * case.batch
    embeddings = torch.randn(size, case.dim, generator=generator).mul(3.0).double()
    shape = (case.num_classes, case.dim) if case.sub_centers == 1 else (case.num_classes, case.sub_centers, case.dim)
    centers = torch.randn(*shape, generator=generator).mul(0.05)
    centers = centers.to(case.stored or centers.dtype).double()
    labels = torch.randint(0, case.num_classes, (size,), generator=generator)
    if case.labels == "same":
        labels = labels[:1].expand(size).clone()
    if case.labels == "low":
        labels %= -(-case.num_classes // world_size)
    return embeddings, labels, centers


def step_on_rank(case: Case) -> StepResult:
    """Runs on every rank: one forward and backward pass on its own part of the tensors."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    embeddings, labels, centers = tensors(case, world_size)
    head = PartialFC(
        case.num_classes,
        case.dim,
        objective=objectives.build(case.objective, **case.parameters),
        sample_rate=case.sample_rate,
        batch_rate=case.batch_rate,
        seed=case.seed,
        center_dtype=case.stored or case.dtype,
        storage=case.storage,
        storage_dir=tempfile.gettempdir(),
        keep_bytes=case.keep_bytes,
        compute_dtype=case.compute_dtype,
        sub_centers=case.sub_centers,
        class_weights=class_weights(case) if case.weighted else None,
        device=case.device,
    )
    head.load_centers(centers.to(case.dtype))
    mine = slice(rank * case.batch, (rank + 1) * case.batch)
    own = embeddings[mine].to(case.device, case.dtype).requires_grad_()
    mine_labels = labels[mine].to(case.device)
    if case.surroundings is not None:
        mine_labels = torch.stack([torch.zeros_like(mine_labels), mine_labels], dim=1)[:, 1]
    with torch.autocast(case.device, case.surroundings, enabled=case.surroundings is not None):
        loss = head(own, mine_labels)
        loss.backward()
    assert own.grad is not None
    sample = head.last_sample
    assert sample is not None
    used = sample.classes[sample.classes >= 0]  # with fixed shapes some places hold none
    learned = [one.grad for one in head.objective_state.learned() if one.grad is not None]
    learned_grad = torch.stack(learned) if learned else torch.empty(0)
    found = (loss.detach(), own.grad, dense_row_gradient(head), used, sample.batch, learned_grad)
    return StepResult(*(tensor.cpu() for tensor in found))


def class_weights(case: Case) -> Tensor:
    return torch.rand(case.num_classes, generator=torch.Generator().manual_seed(case.seed + 1)) * 2


def dense_row_gradient(head: PartialFC) -> Tensor:
    """The gathered row gradients as one dense [rows, D], zero where no gradient is."""
    weight = head.weight.detach().to(computed_dtype(head.weight.dtype))
    total = torch.zeros_like(weight)
    for gradient in head.row_gradients:
        place = slice(None) if gradient.index is None else gradient.index
        total[place] += finished_block(gradient, 0, len(gradient), weight[place])
    return total


def check(cases: Iterable[Case], world_size: int, tolerance: float | None = None) -> None:
    """The head on ``world_size`` ranks against the oracle, case by case: the loss and both gradients."""
    cases = list(cases)
    ranks = [steps_on_rank(cases)] if world_size == 1 else run_ranks(world_size, steps_on_rank, cases)
    for case, *results in zip(cases, *ranks, strict=True):
        compare(case, results, tolerance)


def steps_on_rank(cases: list[Case]) -> list[StepResult]:
    return [step_on_rank(case) for case in cases]


def compare(case: Case, results: list[StepResult], tolerance: float | None = None) -> None:
    """What the ranks made of a step against the oracle."""
    world_size = len(results)
    classes = torch.cat([result.classes for result in results])
    assert torch.equal(classes, classes.unique()), "the ranks' classes, one after the other, ascend, each once"
    for result in results[1:]:
        assert torch.equal(result.sampled_batch, results[0].sampled_batch)
        assert torch.equal(result.loss, results[0].loss)
    expected = oracle(case, world_size, classes, results[0].sampled_batch)
    if tolerance is None:
        tolerance = 1e-12 if case.dtype == torch.float64 else 1e-5
    assert relative_error(results[0].loss, expected[0]) <= tolerance
    # W times the gradient: DDP's average over the ranks takes the W away again.
    embedding_grad = torch.cat([result.embedding_grad for result in results]) / world_size
    assert relative_error(embedding_grad, expected[1]) <= tolerance
    row_grad = torch.cat([result.row_grad for result in results])
    assert relative_error(row_grad, expected[2].flatten(0, -2)) <= tolerance
    for result in results:
        assert relative_error(result.learned_grad, expected[3]) <= tolerance


def oracle(case: Case, world_size: int, classes: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradient by the embeddings [B, D], by the centers [C, D] and by what is learned besides [n], float64."""
    embeddings, labels, centers = tensors(case, world_size)
    embeddings.requires_grad_()
    centers.requires_grad_()
    parameters: dict[str, Any] = case.parameters
    objective = objectives.build(case.objective, **parameters)
    expected = max(2, round(case.num_classes * case.sample_rate))
    state = ObjectiveState(objective, expected, torch.device("cpu"), case.dtype)
    seen = state.numbers(objective, embeddings.detach(), seed=case.seed, step=0, training=True)
    biases = {name: seen.state[name].requires_grad_() for name in sorted(objective.learned)}
    loss = dense_loss(
        case.objective,
        parameters,
        embeddings,
        labels,
        centers,
        classes=classes,
        batch=batch,
        noise=seen.noise,
        weights=class_weights(case).double() if case.weighted else None,
        biases=biases,
    )
    loss.backward()
    assert embeddings.grad is not None
    assert centers.grad is not None
    learned = [one.grad for one in biases.values() if one.grad is not None]
    return loss.detach(), embeddings.grad, centers.grad, torch.stack(learned) if learned else torch.empty(0)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value − expected‖ / ‖expected‖; the plain distance where nothing is expected."""
    distance = float((value.double() - expected).norm())
    size = float(expected.norm())
    return distance / size if size > 1e-30 else distance


_QUESTIONS = frozenset(
    {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "repeat_interleave", "unique_dim"}
    | {"_unique", "_unique2", "unique_consecutive", "bincount"}
)
"""Operations whose answer, or the answer's shape, the host waits for on a GPU."""


class _Questions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if name in _QUESTIONS or masked:
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


def count_questions(function: Callable[[], object]) -> int:
    """How often a GPU's host would wait for an answer inside; counted on a CPU, which takes the same calls."""
    lists = 0  # tolist is no operation on a CPU
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> list[Any]:
        nonlocal lists
        lists += 1
        return tolist(tensor)

    with patch.object(Tensor, "tolist", counted), _Questions() as questions:
        function()
    return len(questions.asked) + lists


class Given:
    """A row gradient that stands in memory: by the rows, or with inverse norms [K, 1] by the normalised rows."""

    needs_rows = False

    def __init__(self, index: Tensor | None, values: Tensor, inverse: Tensor | None = None) -> None:
        self.index, self.values, self.inverse = index, values, inverse

    def __len__(self) -> int:
        return len(self.values)

    def raw_block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        return self.values[start:stop].clone()
