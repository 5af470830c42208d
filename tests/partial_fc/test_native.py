"""The compiled passes against torch's own, which are held against the oracle."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pfc.partial_fc import PartialFC, RowOptimizer, objectives
from pfc.partial_fc.kernels import native
from pfc.partial_fc.kernels.rows import SampledRows, inverse_norms
from pfc.partial_fc.row_update import apply
from tests.partial_fc.cases import Given
from tests.partial_fc.test_optim import ROW_OPTIMIZERS

pytestmark = pytest.mark.skipif(native.passes() is None, reason="pfc was installed without a C compiler")

CLASSES, DIM = 2111, 37


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def trained(name: str, sample_rate: float, keep_bytes: int, objective: objectives.Objective) -> list[Tensor]:
    """Losses, centers and optimizer state of four steps, two of which add up two backward passes."""
    head = PartialFC(
        CLASSES, DIM, objective=objective, sample_rate=sample_rate, keep_bytes=keep_bytes, seed=3, device="cpu"
    )
    with torch.no_grad():
        head.weight[::100] = 0.0
        head.weight[1::100] *= 1e-12
    optimizer: RowOptimizer = ROW_OPTIMIZERS[name](head)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(4):
        for _ in range(1 + step % 2):
            labels = torch.randint(0, CLASSES, (12,), generator=generator) // 100 * 100 + step
            loss = head(torch.randn(12, DIM, generator=generator), labels)
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    state = [value.to_local() for value in optimizer.state_dict()["state"].values()]
    return [torch.stack(losses), head.weight.detach(), *state]


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
@pytest.mark.parametrize(("sample_rate", "keep_bytes"), [(1.0, 1 << 30), (0.3, 1 << 30), (1.0, 0), (0.3, 0)])
def test_training_is_that_of_torchs_passes(
    name: str, sample_rate: float, keep_bytes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = objectives.DSoftmax(scale=16.0, stop=0.5)
    compiled = trained(name, sample_rate, keep_bytes, objective)
    monkeypatch.setattr(native, "passes", lambda: None)
    plain = trained(name, sample_rate, keep_bytes, objective)
    for one, other in zip(compiled, plain, strict=True):
        # AdamW's first steps are the gradients' signs: rounding decides where a gradient is nearly none.
        assert (one - other).norm() <= (1e-2 if name == "adamw" else 1e-5) * other.norm()


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("by_unit", [False, True])
def test_each_rows_step(name: str, sampled: bool, by_unit: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(403, DIM, generator=generator)
    index = torch.arange(403)[1::2] if sampled else None
    count = 403 if index is None else len(index)
    inverse = inverse_norms(weight if index is None else weight[index]) if by_unit else None
    results = []
    for passes in (native.passes, lambda: None):
        monkeypatch.setattr(native, "passes", passes)
        head = PartialFC(403, DIM, objective=objectives.DSoftmax())
        head.load_centers(weight)
        optimizer: RowOptimizer = ROW_OPTIMIZERS[name](head)
        tensors = [head.weight.data, *(value.to_local() for value in optimizer.state_dict()["state"].values())]
        for step in range(3):
            values = torch.randn(count, DIM, generator=torch.Generator().manual_seed(step))
            apply([Given(index, values, inverse)], tensors, optimizer, torch.tensor(0.5), torch.tensor(False))
        results.append(tensors)
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert (results[0][0] != weight).any(dim=1).sum() == count


@pytest.mark.parametrize("objective", [objectives.P2SGrad(), objectives.CosFace(scale=200.0)])
def test_kernels_without_compiled_exponentials_use_the_other_passes(
    objective: objectives.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = trained("momentum", 0.3, 1 << 30, objective)
    monkeypatch.setattr(native, "passes", lambda: None)
    for one, other in zip(compiled, trained("momentum", 0.3, 1 << 30, objective), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("dim", [1, 15, 16, 512, 700])
@pytest.mark.parametrize("sampled", [False, True])
def test_rows_and_norms(dim: int, sampled: bool, threads: int) -> None:
    weight = torch.randn(401, dim)
    weight[3], weight[4], weight[5], weight[6] = 0.0, 1e-11, 1e-30, 1e25
    weight[7] = 1e-9
    index = torch.arange(401)[1::2] if sampled else None
    rows = SampledRows(weight, index)
    block = rows.measure(1, len(rows) - 1)
    expected = weight if index is None else weight[index]
    assert torch.equal(block, expected[1 : len(rows) - 1])
    assert torch.allclose(rows.inverse[1:-1], inverse_norms(expected[1:-1].double()).float(), rtol=1e-6, atol=0.0)


def test_exponentials(threads: int) -> None:
    count, batch, scale = 531, 29, 64.0
    products = torch.rand(count, batch) * 2 - 1
    products[5, 7], products[6, 8], products[9] = -torch.inf, 1.0, -1.0
    inverse = torch.rand(count, 1)
    inverse[5], inverse[11] = 0.0, 1.0
    power = torch.exp(scale * products.double() * inverse.double())
    power[(products * inverse).double() > 0.5] = 0.0
    power[5] = 1.0  # a center of zeros has cosine 0
    power[5, 7] = 0.0
    total = torch.ones(batch, dtype=torch.float64)
    native.exponentials(products, inverse, scale, (torch.full((batch,), 0.5), [0.0, 0.0, -torch.inf, 0.0, 0.0]), total)
    assert torch.allclose(total, 1.0 + power.sum(dim=0), rtol=3e-6)
    assert torch.allclose(products.double(), power * inverse.double(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("numbers", [(1.0, 0.7, 0.0, 0.0), (0.0, 1.2, 0.2, 0.0), (0.0, 0.8, 0.0, 0.6)])
def test_exponentials_of_hard_negatives(threads: int, numbers: tuple[float, ...]) -> None:
    count, batch, scale, shift = 531, 29, 48.0, 7.0
    cosines = torch.rand(count, batch) * 1.98 - 0.99
    inverse, threshold = torch.rand(count, 1) + 0.5, torch.linspace(-0.5, 0.9, batch)
    products = cosines / inverse
    products[5, 7] = -torch.inf
    z = (products * inverse).double().requires_grad_()
    a, b, c, d = numbers
    changed = torch.where(z > threshold, a * z**2 + b * z + c + d * (1 - z**2).sqrt(), z)
    power = torch.exp(scale * changed - shift)
    (slope,) = torch.autograd.grad(changed[z > -2].sum(), z)
    power = torch.where(z > -2, power, 0.0).detach()
    total = torch.ones(batch, dtype=torch.float64)
    native.exponentials(products, inverse, scale, (threshold, [*numbers, shift]), total)
    assert torch.allclose(total, 1.0 + power.sum(dim=0), rtol=1e-5)
    expected = power * torch.where(z > -2, slope, 0.0) * inverse.double()
    assert torch.allclose(products.double(), expected, rtol=1e-4, atol=1e-6 * float(power.max()))


def test_the_smallest_and_the_largest_powers() -> None:
    logits = torch.linspace(-120.0, 88.0, 4001)[:, None].contiguous()
    powers, total = logits.clone(), torch.zeros(1, dtype=torch.float64)
    native.exponentials(powers, torch.ones(4001, 1), 1.0, None, total)
    expected = torch.exp(logits.double())
    expected[logits < -87.0] = 0.0  # below lie numbers that a CPU is slow with
    assert torch.allclose(powers.double(), expected, rtol=2e-7, atol=0.0)


def test_not_a_number_stays_one() -> None:
    products, total = torch.tensor([[torch.nan, 1.0]]), torch.zeros(2, dtype=torch.float64)
    native.exponentials(products, torch.ones(1, 1), 1.0, None, total)
    assert total.isnan().tolist() == [True, False]


def test_offsets_go_beyond_32_bits(tmp_path: Path) -> None:
    rows, dim = 2**32 // 512 + 8, 512  # more floats than 32 bits count; the file is sparse
    weight = torch.from_file(str(tmp_path / "rows"), shared=True, size=rows * dim).view(rows, dim)
    index = torch.tensor([0, rows - 1])
    weight[index] = torch.tensor([[3.0], [4.0]]).expand(2, dim)
    sampled = SampledRows(weight, index)
    assert torch.equal(sampled.measure(0, 2), weight[index])
    gradient = torch.ones(2, dim)
    native.CompiledStep(index, 0, 2, gradient, None, 1.0).sgd(
        weight, None, lr=1.0, momentum=0.0, weight_decay=0.0, nesterov=False
    )
    assert weight[index, 0].tolist() == [2.0, 3.0]
    assert not weight[8:16].any()


@pytest.mark.skipif(native.passes() is None, reason="nothing is compiled here")
def test_a_processor_that_torch_calls_by_a_new_name_takes_the_plainest_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NO AVX")
    loaded = native.passes.__wrapped__()
    assert loaded is not None
    assert "_v" not in Path(loaded._name).name.removeprefix("_native").split(".")[0]


def test_a_file_compiled_from_an_older_text_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_VERSION", -1)
    assert native.passes.__wrapped__() is None
