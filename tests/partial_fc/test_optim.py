"""The row optimizers against torch's own, row by row."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

from pfc.partial_fc import (
    PartialFC,
    RowAdagrad,
    RowAdamW,
    RowOptimizer,
    RowSGD,
    device,
    objectives,
    row_update,
    sampling,
)
from pfc.partial_fc.kernels import native
from tests.partial_fc.cases import Given, count_questions, dense_row_gradient
from tests.ranks import run_ranks

CLASSES, DIM = 60, 6

# name → (ours, torch's for one row)
TWINS: dict[str, tuple[Callable[[PartialFC], RowOptimizer], Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "sgd": (lambda head: RowSGD(head, 0.3), lambda row: torch.optim.SGD(row, 0.3)),
    "momentum": (
        lambda head: RowSGD(head, 0.3, momentum=0.9, weight_decay=0.01),
        lambda row: torch.optim.SGD(row, 0.3, momentum=0.9, weight_decay=0.01),
    ),
    "nesterov": (
        lambda head: RowSGD(head, 0.3, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda row: torch.optim.SGD(row, 0.3, momentum=0.9, weight_decay=0.01, nesterov=True),
    ),
    "adamw": (
        lambda head: RowAdamW(head, 0.05, weight_decay=0.1),
        lambda row: torch.optim.AdamW(row, 0.05, weight_decay=0.1),
    ),
}
ROW_OPTIMIZERS: dict[str, Callable[[PartialFC], RowOptimizer]] = {name: ours for name, (ours, _) in TWINS.items()} | {
    "adagrad": lambda head: RowAdagrad(head, 0.1, weight_decay=0.01)
}


def make_head(sample_rate: float = 0.2, dtype: torch.dtype = torch.float64) -> PartialFC:
    return PartialFC(CLASSES, DIM, objective=objectives.DSoftmax(), sample_rate=sample_rate, center_dtype=dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, DIM, generator=generator), torch.randint(0, CLASSES, (5,), generator=generator)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("sample_rate", [0.2, 1.0])
def test_each_row_is_stepped_as_torch_steps_a_parameter_that_is_touched(name: str, sample_rate: float) -> None:
    head = make_head(sample_rate)
    ours, twin = TWINS[name]
    optimizer = ours(head)
    rows = [torch.nn.Parameter(row.clone()) for row in head.weight.detach()]
    twins = [twin([row]) for row in rows]
    for step in range(12):
        head(*batch(step)).backward()
        gradient = dense_row_gradient(head)
        for row in head.last_sample.classes.tolist():
            rows[row].grad = gradient[row]
            twins[row].step()
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.stack([row.detach() for row in rows])
    assert torch.allclose(head.weight, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["momentum", "nesterov", "adamw"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("sub_centers", [1, 2])
def test_a_dense_step_is_torchs_by_a_dense_gradient(name: str, passes: int, sub_centers: int) -> None:
    head = PartialFC(CLASSES, DIM, objective=objectives.DSoftmax(), sample_rate=0.2, center_dtype=torch.float64,
        sub_centers=sub_centers)  # fmt: skip
    made: dict[str, Callable[[], RowOptimizer]] = {
        "momentum": lambda: RowSGD(head, 0.3, momentum=0.9, weight_decay=0.01, dense=True),
        "nesterov": lambda: RowSGD(head, 0.3, momentum=0.9, weight_decay=0.01, nesterov=True, dense=True),
        "adamw": lambda: RowAdamW(head, 0.05, weight_decay=0.1, dense=True),
    }
    ours = copy.deepcopy(made[name]())
    head = ours.head
    matrix = torch.nn.Parameter(head.weight.detach().clone())
    twin = TWINS[name][1]([matrix])
    for step in range(8):
        for number in range(passes):
            head(*batch(step * passes + number)).backward()
        matrix.grad = dense_row_gradient(head)
        twin.step()
        ours.step()
        ours.zero_grad()
    assert torch.allclose(head.weight, matrix, rtol=1e-12, atol=1e-14)


def test_rowwise_adagrad_by_its_formula() -> None:
    head = make_head(1.0)
    optimizer = RowAdagrad(head, lr=0.1, eps=1e-10, weight_decay=0.01)
    weight, total = head.weight.detach().clone(), torch.zeros(CLASSES, 1, dtype=torch.float64)
    for step in range(5):
        head(*batch(step)).backward()
        gradient = dense_row_gradient(head) + 0.01 * weight
        total += gradient.square().mean(dim=1, keepdim=True)
        weight -= 0.1 * gradient / (total.sqrt() + 1e-10)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(head.weight, weight, rtol=1e-12)


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_rows_not_sampled_keep_every_bit(name: str) -> None:
    head = make_head(dtype=torch.float32)
    optimizer = ROW_OPTIMIZERS[name](head)
    for step in range(6):
        before = head.weight.detach().clone()
        state_before = {key: value.to_local().clone() for key, value in optimizer.state_dict()["state"].items()}
        head(*batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        untouched = torch.ones(CLASSES, dtype=torch.bool)
        untouched[head.last_sample.classes] = False
        assert untouched.any()
        assert torch.equal(head.weight[untouched], before[untouched])
        assert not torch.equal(head.weight[~untouched], before[~untouched])
        for key, value in optimizer.state_dict()["state"].items():
            assert torch.equal(value.to_local()[untouched], state_before[key][untouched])


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_micro_batches_are_averaged(name: str) -> None:
    """Two halves with different samples, each loss divided by two: one step along the average."""
    head, again = make_head(), make_head()
    optimizer, other = ROW_OPTIMIZERS[name](head), ROW_OPTIMIZERS[name](again)
    gradients = []
    for step in range(2):
        again.steps = step
        again(*batch(step)).backward()
        gradients.append((dense_row_gradient(again), again.last_sample.classes))
        again.clear_gradients()
        (head(*batch(step)) / 2).backward()
    optimizer.step()
    average = (gradients[0][0] + gradients[1][0]) / 2
    touched = torch.cat([classes for _, classes in gradients]).unique()
    # The same step from a single pass: its values replaced by the average, on the union of the rows.
    again.steps = 0
    again(*batch(0)).backward()
    again.row_gradients[:] = [Given(touched, average[touched])]
    other.step()
    assert torch.allclose(head.weight, again.weight, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("cleared_by", ["the head", "an outer module", "an outer module, to zero", "its optimizer"])
def test_gradients_that_were_cleared_are_not_applied(cleared_by: str) -> None:
    """A module's zero_grad clears the gradients of parameters, and knows no row gradients."""
    heads = []
    for clear in (False, True):
        head = make_head()
        optimizer = RowSGD(head, 0.3)
        outer = torch.nn.Sequential(head)
        if clear:
            embeddings, labels = batch(1)
            head(embeddings.requires_grad_(), labels).backward()
            cleared = {"the head": head, "its optimizer": optimizer}.get(cleared_by, outer)
            cleared.zero_grad(set_to_none=cleared_by != "an outer module, to zero")
            head.steps = 0
        embeddings, labels = batch(2)
        head(embeddings.requires_grad_(), labels).backward()
        assert len(head.row_gradients) == 1
        optimizer.step()
        heads.append(head)
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_gradients_are_applied_once() -> None:
    """What a step leaves are gradients of centers that have moved since."""
    head = make_head()
    optimizer = RowSGD(head, 0.3)
    embeddings, labels = batch(1)
    head(embeddings.requires_grad_(), labels).backward()
    optimizer.step()
    left = head.weight.clone()
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) after every step"):
        optimizer.step()
    assert torch.equal(head.weight, left)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(head.weight, left), "nothing to apply"


def test_an_update_of_ones_own_is_taken() -> None:
    """Not the compiled pass that the class it derives from has for another rule."""

    class Flipped(RowSGD):
        def update(self, weight: Tensor, gradient: Tensor, state: list[Tensor]) -> None:
            super().update(weight, -gradient, state)

    moved = []
    for kind in (RowSGD, Flipped):
        head = make_head(dtype=torch.float32)
        before = head.weight.detach().clone()
        embeddings, labels = batch(1)
        head(embeddings.requires_grad_(), labels).backward()
        kind(head, 0.3).step()
        moved.append(head.weight.detach() - before)
    torch.testing.assert_close(moved[1], -moved[0])


@pytest.mark.parametrize("form", ["transposed", "float64"])
def test_gradients_from_elsewhere_may_lie_in_memory_as_they_like(form: str) -> None:
    values = torch.randn(3, DIM, dtype=torch.float64)
    given = values.T.contiguous().T.float() if form == "transposed" else values

    class Raw(Given):
        def raw_block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
            return self.values[start:stop]

    head = make_head(dtype=torch.float32)
    before = head.weight.detach().clone()
    optimizer = RowSGD(head, 1.0)
    head.row_gradients.append(Raw(torch.tensor([1, 5, 9]), given))
    head.accumulated_scale = torch.ones(())
    head.gradient_scale.grad = torch.ones(())
    optimizer.step()
    torch.testing.assert_close((before - head.weight.detach())[[1, 5, 9]], values.float())


def test_a_copied_optimizer_steps_its_own_head() -> None:
    head = make_head()
    optimizer = RowSGD(head, 0.3, momentum=0.9)
    for step in range(2):
        embeddings, labels = batch(step)
        head(embeddings.requires_grad_(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    other_head, other = copy.deepcopy((head, optimizer))
    assert other.head is other_head
    for one, its in ((head, optimizer), (other_head, other)):
        embeddings, labels = batch(7)
        one(embeddings.requires_grad_(), labels).backward()
        its.step()
    assert torch.equal(head.weight, other_head.weight)
    assert head.weight.data_ptr() != other_head.weight.data_ptr()


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_state_dict_goes_on_where_it_was(name: str) -> None:
    head, resumed = make_head(), make_head()
    optimizer = ROW_OPTIMIZERS[name](head)
    for step in range(3):
        _step(head, optimizer, step)
    restored = ROW_OPTIMIZERS[name](resumed)
    resumed.load_centers(head.centers.full_tensor())
    resumed.steps = head.steps
    restored.load_state_dict(optimizer.state_dict())
    for step in range(3, 6):
        _step(head, optimizer, step)
        _step(resumed, restored, step)
    assert torch.equal(head.weight, resumed.weight)


def _step(head: PartialFC, optimizer: RowOptimizer, step: int) -> None:
    head(*batch(step)).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_state_of_another_optimizer_is_refused() -> None:
    head = make_head()
    with pytest.raises(ValueError, match="needs"):
        RowAdamW(head).load_state_dict(RowSGD(head, 0.1, momentum=0.9).state_dict())


def test_learning_rate_schedulers_work() -> None:
    head = make_head()
    optimizer = RowSGD(head, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    _step(head, optimizer, 0)
    scheduler.step()
    before = head.weight.detach().clone()
    _step(head, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == 0
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_changes_nothing_but_the_scale(unscale_first: bool) -> None:
    head, plain = make_head(), make_head()
    optimizer, other = RowSGD(head, 0.1, momentum=0.9), RowSGD(plain, 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        scaler.scale(head(*batch(step))).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        _step(plain, other, step)
    assert torch.allclose(head.weight, plain.weight, rtol=1e-12)
    assert scaler.get_scale() == 1024.0


def test_grad_scaler_skips_an_overflow_and_lowers_its_scale() -> None:
    head = make_head(dtype=torch.float32)
    optimizer = RowSGD(head, 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = head.weight.detach().clone()
    scaler.scale(head(*batch(0))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(head.weight, before)
    assert scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("where", ["embedding", "loss", "center"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(where: str) -> None:
    for changed, skipped in run_ranks(3, _broken_step, where):
        assert not changed
        assert skipped == 1


def _broken_step(where: str) -> tuple[bool, int]:
    head = PartialFC(CLASSES, DIM, objective=objectives.CosFace(), sample_rate=0.5)
    optimizer = RowSGD(head, 0.1, momentum=0.9, weight_decay=0.1)
    embeddings, labels = batch(dist.get_rank())
    here = dist.get_rank() == 1
    if here and where == "embedding":
        embeddings[2, 3] = torch.inf
    if here and where == "center":
        head.weight.data[:] = torch.nan
    before = head.weight.detach().clone()
    loss = head(embeddings, labels)
    (loss * torch.nan if here and where == "loss" else loss).backward()
    optimizer.step()
    state = optimizer.state_dict()["state"]["momentum"].to_local()
    changed = not torch.equal(head.weight.nan_to_num(), before.nan_to_num()) or bool(state.any())
    optimizer.zero_grad()
    if where != "center":  # and the next good step counts again
        _step(head, optimizer, 9)
        assert not torch.equal(head.weight, before)
    return changed, int(optimizer.skipped_steps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda head: RowSGD(head, lr=-1), "lr must be at least 0, found -1"),
        (lambda head: RowSGD(head, lr=1, momentum=1.0), r"momentum must lie in \[0, 1\), found 1.0"),
        (lambda head: RowSGD(head, lr=1, nesterov=True), "nesterov needs momentum > 0"),
        (lambda head: RowAdamW(head, betas=(0.9, 1.0)), r"betas\[1\] must lie in"),
        (lambda head: RowAdagrad(head, eps=-1), "eps must be at least 0"),
    ],
)
def test_impossible_hyper_parameters_are_named(make: Callable[[PartialFC], RowOptimizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(make_head())


@pytest.mark.parametrize("objective", [objectives.CosFace(scale=32.0), objectives.CosFace(scale=100.0),
    objectives.P2SGrad(gram=True), objectives.P2SGrad(gram=False)], ids=str)  # fmt: skip
@pytest.mark.parametrize("sample_rate", [1.0, 0.02])
@pytest.mark.parametrize("passes", [1, 3])
def test_without_fused_kernels_a_step_asks_little(
    objective: objectives.Objective, sample_rate: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass asks how many classes its sample has and where the batch's own stand, a sum of passes the same twice."""
    head = PartialFC(9001, 8, objective=objective, sample_rate=sample_rate)
    optimizer = RowSGD(head, 0.1, momentum=0.9)
    batches = [(torch.randn(9, 8, requires_grad=True), torch.randint(0, 9001, (9,))) for _ in range(passes)]

    def step() -> None:
        for embeddings, labels in batches:
            head(embeddings, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    made = sampling._permuted

    def by_the_host(*arguments: Any) -> Tensor:
        with disable_current_modes():
            return made(*arguments)

    monkeypatch.setattr(sampling, "_permuted", by_the_host)
    monkeypatch.setattr(device, "host_sees", lambda _: False)
    monkeypatch.setattr(native, "supports", lambda _: False)
    monkeypatch.setattr(row_update, "block_rows", lambda *_: 64)
    expected = passes if sample_rate == 1.0 else 2 * passes + 2 * (passes > 1)
    assert count_questions(step) == expected
