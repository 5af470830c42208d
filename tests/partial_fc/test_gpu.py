"""What only a GPU can show of the head (docs/devices.md); needs torch, Triton and pytest alone.

``make test-gpu`` runs it on a GPU. Without one a part of it runs on the CPU, so that the tests themselves are right.
"""

import copy
import itertools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pfc.partial_fc import PartialFC, RowAdagrad, RowAdamW, RowSGD, objectives
from pfc.partial_fc.centers import ClassShard
from pfc.partial_fc.sampling import sample_classes
from tests.partial_fc.cases import OBJECTIVES, Case, compare, relative_error, step_on_rank
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
on_gpu_only = pytest.mark.skipif(not GPU, reason="there is no GPU here")
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda head: RowSGD(head, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda head: RowAdamW(head, lr=0.01),
    "adagrad": lambda head: RowAdagrad(head, lr=0.1),
}
SHAPES: list[dict[str, Any]] = [{}, {"sample_rate": 0.3, "batch_rate": 0.5}, {"labels": "same", "keep_bytes": 0}]


@pytest.fixture(params=["fused", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which way the step goes; a CPU has one."""
    if request.param == "plain":
        monkeypatch.setattr("pfc.partial_fc.device.fits", lambda *_: False)
    return request.param


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_the_oracles(name: str, path: str) -> None:
    """In float32 to 2e-5: a GPU adds in another order than the CPU, whose bar is 1e-5."""
    for shape, scale in itertools.product(SHAPES, (None, 100.0)):
        larger = {"scale": scale} if scale and "scale" in OBJECTIVES[name] else {}
        case = Case(name, OBJECTIVES[name] | larger, device=DEVICE, num_classes=1003, dim=64, **shape)
        compare(case, [step_on_rank(case)], tolerance=2e-5)


@pytest.mark.parametrize(
    ("classes", "dim", "batch", "rate", "products", "bound"),
    [
        (9001, 100, 33, 0.2, torch.float32, 1e-4),
        (300_001, 512, 1024, 1.0, torch.bfloat16, 3e-2),
        (4_300_000, 512, 64, 0.01, torch.bfloat16, 3e-2),  # offsets beyond 2³¹
    ],
)
def test_three_steps_are_those_of_the_plain_path(
    classes: int, dim: int, batch: int, rate: float, products: Any, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both paths round their operands to bfloat16, but not the same ones: rows before or after normalising."""
    if not GPU:
        classes = min(classes, 9001)
    elif torch.cuda.get_device_properties(0).total_memory < 8 * classes * dim * 4:
        pytest.skip("takes too much memory for this card")
    numbers = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("pfc.partial_fc.device.fits", lambda *_: False)
        head = PartialFC(
            classes, dim, objective=objectives.CosFace(), sample_rate=rate, compute_dtype=products, device=DEVICE
        )
        optimizer = OPTIMIZERS["sgd"](head)
        some = torch.arange(0, classes, max(1, classes // 5000), device=DEVICE)
        before = head.centers.to_local()[some].clone()
        found = {}
        for step, (embeddings, labels) in enumerate(batches(classes, dim, batch, 3)):
            loss = head(embeddings, labels)
            loss.backward()
            found |= {f"loss {step}": loss.detach(), f"embeddings {step}": embeddings.grad}
            optimizer.step()
            optimizer.zero_grad()
        momentum = optimizer.state_dict()["state"]["momentum"].to_local()[some]
        numbers.append(found | {"centers": head.centers.to_local()[some] - before, "momentum": momentum})
        del head, optimizer
    for name, value in numbers[0].items():
        assert relative_error(value, numbers[1][name].double()) <= bound, name


@pytest.mark.parametrize(("classes", "ranks"), [(1_000_003, 3), (6145, 2)])
def test_the_card_draws_the_cpus_sample(classes: int, ranks: int) -> None:
    labels = torch.randint(0, classes, (500,), generator=torch.Generator().manual_seed(classes))
    shard = ClassShard.of(classes, ranks - 1, ranks)
    for step in range(3):
        there = sample_classes(labels.to(DEVICE), shard, rate=0.13, seed=7, step=step, fixed=GPU)
        here = sample_classes(labels, shard, rate=0.13, seed=7, step=step)
        assert torch.equal(there.classes.cpu(), here.classes)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["cosface", "p2sgrad"])
def test_autocast_around_it_and_labels_in_a_column_change_nothing(name: str, precision: Any, path: str) -> None:
    for shape in SHAPES[:2]:
        case = Case(name, OBJECTIVES[name], device=DEVICE, num_classes=1003, dim=64, surroundings=precision, **shape)
        compare(case, [step_on_rank(case)], tolerance=2e-5)


@pytest.mark.parametrize(("products", "tolerance"), [("tf32", 0.02), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_tensor_cores_stay_within_what_is_stated(name: str, products: Any, tolerance: float, path: str) -> None:
    """An operand's last bit, 2⁻¹¹ or 2⁻⁹ of it, times the scale, is what a logit may be off by."""
    case = Case(name, OBJECTIVES[name], device=DEVICE, num_classes=1003, dim=64, compute_dtype=products)
    compare(case, [step_on_rank(case)], tolerance=tolerance)


@contextmanager
def alarm() -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU raises."""
    if not GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batches(classes: int, dim: int, size: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [
        (torch.randn(size, dim, generator=generator), torch.randint(0, classes, (size,), generator=generator))
        for _ in range(count)
    ]
    return [(embeddings.to(DEVICE).requires_grad_(), labels.to(DEVICE)) for embeddings, labels in drawn]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("rate", "passes"), [(1.0, 1), (0.1, 1), (0.1, 2)])
def test_a_steady_step_never_makes_the_host_wait(name: str, rate: float, passes: int) -> None:
    head = PartialFC(20_001, 128, objective=objectives.CosFace(), sample_rate=rate, device=DEVICE)
    optimizer = OPTIMIZERS[name](head)
    for step in range(5):
        given = batches(20_001, 128, 64, passes)
        with alarm() if step > 2 else nullcontext():  # the first ones compile, and allocate
            for embeddings, labels in given:
                (head(embeddings, labels) / passes).backward()
            optimizer.step()
            optimizer.zero_grad()


def trained(name: str, device: str, *, wait: bool = False) -> dict[str, torch.Tensor]:
    """Centers and state after four steps of two passes each."""
    head = PartialFC(3001, 64, objective=objectives.CosFace(), sample_rate=0.2, device=device)
    optimizer = OPTIMIZERS[name](head)
    given = batches(3001, 64, 32, 8)
    for first, second in zip(given[::2], given[1::2], strict=True):
        for embeddings, labels in (first, second):
            (head(embeddings.detach().to(device).requires_grad_(), labels.to(device)) / 2).backward()
        if wait and GPU:
            torch.cuda.synchronize()
        optimizer.step()
        if wait:
            head.wait_for_update()
        optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    found = {"centers": head.centers.to_local()} | {key: value.to_local() for key, value in state.items()}
    return {key: value.cpu().clone() for key, value in found.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_beside_the_backward_pass_gives_the_same_numbers(name: str) -> None:
    beside, behind, on_cpu = trained(name, DEVICE), trained(name, DEVICE, wait=True), trained(name, "cpu")
    for key, value in behind.items():
        assert relative_error(beside[key], value.double()) < 1e-6, key
        assert relative_error(value, on_cpu[key].double()) < 1e-4, key


class Late:
    """A head whose row update the card reaches late: it is busy with something else for a tenth of a second."""

    def __init__(self, name: str = "sgd") -> None:
        self.head = PartialFC(3001, 64, objective=objectives.CosFace(), device=DEVICE)
        self.optimizer = OPTIMIZERS[name](self.head)
        self.embeddings, self.labels = batches(3001, 64, 32, 1)[0]
        self.before = self.head.centers.to_local().clone()

    def backward(self) -> None:
        self.head(self.embeddings, self.labels).backward()

    def step(self) -> None:
        side = self.head.side_stream
        assert side is not None
        if GPU:
            with torch.cuda.stream(side._stream):
                torch.cuda._sleep(200_000_000)
        self.optimizer.step()

    def moved(self, centers: torch.Tensor) -> float:
        return float((centers.to(DEVICE) - self.before).norm())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "double", "cpu"])
def test_a_copy_has_what_the_last_step_left(how: str) -> None:
    late = Late()
    late.backward()
    late.step()
    if how in ("deepcopy", "pickle"):
        copied = copy.deepcopy(late.head) if how == "deepcopy" else pickle.loads(pickle.dumps(late.head))
    else:
        copied = getattr(late.head, how)()
    assert late.moved(copied.weight.detach().float()) > 0.01


@pytest.mark.parametrize("between", ["evaluate", "state_dict", "load_state_dict"])
def test_what_comes_between_the_backward_pass_and_the_step_is_waited_for(between: str) -> None:
    """The update may begin where the head's gradients are there, but not beside what uses the centers after that."""
    late = Late()
    with torch.no_grad():
        expected = late.head.eval()(late.embeddings, late.labels)
    late.head.train()
    if between == "load_state_dict":
        saved = copy.deepcopy(late.optimizer.state_dict())
    late.backward()
    if GPU:
        torch.cuda._sleep(200_000_000)
    if between == "evaluate":
        with torch.no_grad():
            found = late.head.eval()(late.embeddings, late.labels)
    elif between == "state_dict":
        late.optimizer.state_dict()
    else:
        late.optimizer.load_state_dict(saved)
    late.optimizer.step()
    if between == "evaluate":
        assert relative_error(found, expected.double()) < 1e-6
    else:
        assert float(late.optimizer.state_dict()["state"]["momentum"].to_local().norm()) > 0.01


@on_gpu_only
def test_another_stream_that_reads_the_centers_frees_nothing_that_is_in_use() -> None:
    late = Late()
    late.backward()
    late.step()
    late.optimizer.zero_grad()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        late.head.state_dict()
    taken = [torch.full((1 << 18,), torch.nan, device=DEVICE) for _ in range(64)]  # memory that came free
    assert late.head.centers.to_local().isfinite().all()
    del taken


@on_gpu_only
def test_a_cuda_graph_of_a_sampled_step_is_refused() -> None:
    head = PartialFC(3001, 64, objective=objectives.CosFace(), sample_rate=0.2, device=DEVICE)
    embeddings, labels = batches(3001, 64, 32, 1)[0]
    head(embeddings, labels)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="at every replay"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        head(embeddings, labels)


@pytest.mark.parametrize("dim", [64, 128, 512])
def test_adamw_counts_each_step_once(dim: int, path: str) -> None:
    """A count that one warp writes while another still reads it moves a row as in its second step."""
    head = PartialFC(20_000, dim, objective=objectives.Softmax(scale=16.0), device=DEVICE)
    optimizer = RowAdamW(head, lr=0.01, weight_decay=0.0)
    before = head.centers.to_local().clone()
    head(*batches(20_000, dim, 64, 1)[0]).backward()
    optimizer.step()
    moved = (head.centers.to_local() - before).abs().median(dim=1).values
    assert float(moved.min()) > 0.0099, "the first step of AdamW is lr, whatever the gradient"
    assert float(moved.max()) < 0.0101


@on_gpu_only
def test_memory_follows_the_classes_sampled() -> None:
    peaks = []
    for classes in (100_000, 400_000):
        head = PartialFC(classes, 128, objective=objectives.CosFace(), sample_rate=10_000 / classes, device=DEVICE)
        optimizer = OPTIMIZERS["sgd"](head)
        for embeddings, labels in batches(classes, 128, 64, 3):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            head(embeddings, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            head.wait_for_update()
            torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del head, optimizer
    assert peaks[1] < 1.2 * peaks[0], peaks


def on_one_card(case: Case) -> tuple[Any, str]:
    """On a rank of gloo, which may not take a GPU's tensors."""
    try:
        return step_on_rank(case), ""
    except RuntimeError as error:
        if "gloo" in str(error).lower() or "not support" in str(error).lower():
            return None, str(error)
        raise


def test_two_ranks_over_gloo_share_one_card() -> None:
    case = Case("cosface", OBJECTIVES["cosface"], device=DEVICE, num_classes=1003, dim=64, sample_rate=0.3)
    told = run_ranks(2, on_one_card, case)
    if any(problem for _, problem in told):
        pytest.skip(f"gloo does not take a GPU's tensors here: {told[0][1]}")
    compare(case, [result for result, _ in told], tolerance=2e-5)


@on_gpu_only
def test_one_rank_over_nccl() -> None:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        case = Case("arcface", OBJECTIVES["arcface"], device=DEVICE, num_classes=1003, dim=64)
        compare(case, [step_on_rank(case)], tolerance=2e-5)
    finally:
        dist.destroy_process_group()
