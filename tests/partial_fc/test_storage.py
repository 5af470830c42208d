"""Centers in host memory, in a file, in bfloat16: the numbers of those on the device, whatever happens in between."""

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pfc.partial_fc import PartialFC, RowAdagrad, RowAdamW, RowOptimizer, RowSGD, device, objectives
from pfc.partial_fc import storage as storage_module
from pfc.partial_fc.kernels import native
from pfc.partial_fc.kernels.rounding import Rounding
from pfc.partial_fc.row_update import apply
from tests.partial_fc.cases import Case, Given, check
from tests.ranks import run_ranks

CLASSES, DIM = 2003, 24
OPTIMIZERS = {
    "momentum": (lambda head: RowSGD(head, 0.5, 0.9, 1e-3), RowSGD.row_state(DIM, 0.9)),
    "adamw": (lambda head: RowAdamW(head, 0.05), RowAdamW.row_state(DIM)),
    "adagrad": (lambda head: RowAdagrad(head, 0.05), RowAdagrad.row_state(DIM)),
}


def trained(
    storage: str, folder: Path, dtype: torch.dtype, name: str, steps: int, sub_centers: int = 1
) -> list[Tensor]:
    """Losses, centers and state after steps at random rates, of one or several passes, and what may come between."""
    make, state = OPTIMIZERS[name]
    head = PartialFC(
        CLASSES,
        DIM,
        objective=objectives.CosFace(),
        sample_rate=0.05,
        center_dtype=dtype,
        storage=storage,  # type: ignore[arg-type]
        storage_dir=folder,
        row_state=state,
        seed=5,
        sub_centers=sub_centers,
    )
    optimizer, losses = make(head), []
    generator = torch.Generator().manual_seed(1)

    def chance(share: float) -> bool:
        return bool(torch.rand((), generator=generator) < share)

    def loss() -> Tensor:
        labels = torch.randint(0, 20, (9,), generator=generator) * 100  # few, so that steps share them
        return head(torch.randn(9, DIM, generator=generator), labels)

    for _ in range(steps):
        for _ in range(3 if chance(0.2) else 1):
            losses.append(loss())
            if chance(0.1):
                with torch.no_grad():
                    losses.append(loss())  # between a pass and its backward
            losses[-1 if losses[-1].requires_grad else -2].backward()
        if chance(0.05):
            head.gradient_scale.grad *= torch.nan  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
        if chance(0.1):  # two passes, each with a step of its own, but no pass between
            two = loss(), loss()
            for one in two:
                one.backward()
                optimizer.step()
                optimizer.zero_grad()
        if chance(0.1):
            head.sample_rate = (0.02, 0.3, 1.0)[int(torch.randint(0, 3, (), generator=generator))]
        if chance(0.05):
            with torch.no_grad():
                losses.append(loss())  # a sample that no update follows
                losses.append(head.eval()(torch.randn(2, DIM, generator=generator), torch.tensor([7, CLASSES - 1])))
            head.train()
        if chance(0.05):
            head.load_centers(head.centers.to_local().clone() * 1.5)
        if chance(0.05):
            head.load_state_dict(head.state_dict())
            optimizer.load_state_dict(optimizer.state_dict())
    kept = [value.to_local() for value in optimizer.state_dict()["state"].values()]
    return [torch.stack(losses).detach(), head.centers.to_local(), optimizer.skipped_steps, *kept]


@pytest.mark.parametrize(
    ("name", "dtype"), [("momentum", torch.float32), ("adamw", torch.bfloat16), ("adagrad", torch.bfloat16)]
)
def test_every_storage_has_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    expected = trained("device", tmp_path, dtype, name, 200)
    assert expected[2] > 3
    for storage in ("host", "file", "host of a GPU"):
        if storage == "host of a GPU":  # rows pass through other memory than the head's
            monkeypatch.setattr(device, "host_side", lambda parts: [torch.empty_like(part) for part in parts])
        found = trained(storage.split()[0], tmp_path, dtype, name, 200)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other), storage
    assert list(tmp_path.iterdir()) == [], "the file has no name, and ends with the process"


def test_sub_centers_have_the_same_numbers_in_every_storage(tmp_path: Path) -> None:
    expected = trained("device", tmp_path, torch.bfloat16, "momentum", 60, sub_centers=3)
    for storage in ("host", "file"):
        found = trained(storage, tmp_path, torch.bfloat16, "momentum", 60, sub_centers=3)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other), storage


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stored_elsewhere_and_narrow_it_is_as_exact(world_size: int) -> None:
    cases = [
        Case(objective, parameters, sample_rate=rate, storage=storage, stored=stored)
        for objective, parameters in (("cosface", {"scale": 64.0, "margin": 0.35}), ("p2sgrad", {}))
        for rate in (0.3, 1.0)
        for storage, stored in (("host", None), ("file", torch.bfloat16), ("device", torch.bfloat16))
    ]
    check(cases, world_size)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sampled", [False, True])
def test_compiled_rounding_is_that_of_torch(name: str, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for passes in (native.passes, lambda: None):
        monkeypatch.setattr(native, "passes", passes)
        head = PartialFC(403, 37, objective=objectives.DSoftmax(), center_dtype=torch.bfloat16)
        optimizer: RowOptimizer = OPTIMIZERS[name][0](head)
        tensors = [head.weight.data, *(value.to_local() for value in optimizer.state_dict()["state"].values())]
        index = torch.arange(403)[1::2] if sampled else None
        for step in range(3):
            values = torch.randn(
                403 if index is None else len(index), 37, generator=torch.Generator().manual_seed(step)
            )
            how = Rounding.of(3, step, 11, None)
            apply([Given(index, values, None)], tensors, optimizer, torch.tensor(1.0), torch.tensor(False), how)
        results.append(tensors)
    for one, other in zip(*results, strict=True):
        # The compiled pass may fuse a product and a sum, and a result beside a threshold then falls to its other side.
        differ = one != other if one.dtype == torch.bfloat16 else (one - other).abs() > 1e-5 * other.abs()
        assert differ.float().mean() < 0.01


def test_rounding_is_right_on_average_and_the_same_on_any_shard() -> None:
    values = torch.full((4000, 33), 1.0 + 2**-7 * 0.25)
    rounded = Rounding.of(3, 7, 0, None).rounded(values, 0, 0)
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    up = (rounded > 1).float()
    assert (up.mean() - 0.25).abs() < 5e-3
    assert ((up.mean(dim=0) - 0.25).abs() < 0.03).all(), "at every place of a row"
    assert not torch.equal(rounded, Rounding.of(3, 8, 0, None).rounded(values, 0, 0)), "another step, another rounding"
    ids = torch.tensor([5, 7, 990])
    assert torch.equal(Rounding.of(3, 7, 1000, ids).rounded(values[:3], 0, 0), rounded[1000 + ids])


def test_steps_too_small_for_bfloat16_add_up() -> None:
    head = PartialFC(64, 32, objective=objectives.Softmax(), center_dtype=torch.bfloat16)
    head.load_centers(torch.ones(64, 32))
    optimizer = RowSGD(head, lr=2**-11)
    for _ in range(256):
        head.steps += 1
        apply(
            [Given(None, torch.ones(64, 32), None)],
            [head.weight.data],
            optimizer,
            torch.tensor(1.0),
            torch.tensor(False),
            optimizer._rounding(),
        )
    assert abs(head.weight.float().mean().item() - (1 - 256 * 2**-11)) < 2e-3


def test_a_pass_that_failed_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for storage in ("device", "host"):
        head = PartialFC(
            CLASSES, DIM, objective=objectives.CosFace(), sample_rate=0.1, storage=storage, row_state={"momentum": DIM}
        )  # fmt: skip  # type: ignore[arg-type]
        optimizer = RowSGD(head, 0.5, 0.9)
        for step in range(12):
            embeddings = torch.randn(9, DIM, generator=torch.Generator().manual_seed(step))
            if storage == "host" and step in (4, 7):
                with monkeypatch.context() as patch:
                    patch.setattr(storage_module._Buffer, "_gather", _fails)  # reads ahead too
                    for _ in range(2):  # one of which may find its rows read ahead already
                        with suppress(OSError):
                            head(embeddings, torch.arange(9) + step)
                head.state_dict()
                head.steps = step
            head(embeddings, torch.arange(9) + step).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(head.centers.to_local())
    assert torch.equal(*results)


def _fails(*_: object) -> None:
    raise OSError("read error")


class _Largest(TorchDispatchMode):
    """The most numbers of a tensor that is made inside."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in before:
            self.numbers = max(self.numbers, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("storage", ["device", "host"])
def test_a_step_makes_nothing_that_grows_with_the_classes(storage: str) -> None:
    largest = []
    for classes in (20_000, 200_000):
        head = PartialFC(
            classes,
            8,
            objective=objectives.CosFace(),
            sample_rate=400 / classes,
            storage=storage,  # type: ignore[arg-type]
            row_state=RowSGD.row_state(8, 0.9),
        )
        optimizer = RowSGD(head, 0.1, 0.9)
        with _Largest() as seen:
            for step in range(3):
                head(torch.randn(16, 8), torch.arange(16) + step).backward()
                optimizer.step()
                optimizer.zero_grad()
        largest.append(seen.numbers)
    assert largest[1] < 2 * largest[0]


def test_the_copies_stop_growing_on_shards_that_do_not_divide() -> None:
    """How many of a block's classes are drawn from a shard's part of it differs from step to step."""
    for memory in run_ranks(2, _memory_of_copies):
        assert len(memory) > 2, "the steps' rows differ in number"
        assert max(memory) < 1.04 * min(memory), "and their memory was made once"


def _memory_of_copies() -> list[int]:
    """Of the steps' copies: the distinct sizes that it had, and the most rows that a step had."""
    head = PartialFC(30_001, 8, objective=objectives.CosFace(), sample_rate=0.5, storage="host")
    optimizer, sizes, counts = RowSGD(head, 0.1), set[int](), set[int]()
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        embeddings = torch.randn(4, 8, generator=generator, requires_grad=True)
        head(embeddings, torch.randint(0, 30_001, (4,), generator=generator)).backward()
        taken = head.staged.latest if head.staged is not None else None
        assert taken is not None
        sizes.add(len(taken.parts[0]))
        counts.add(len(taken.places))
        optimizer.step()
        optimizer.zero_grad()
    assert len(sizes) <= 2, f"the two copies' memory grew: {sorted(sizes)}"
    return sorted(counts)


def test_what_cannot_be_stored_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objectives.CosFace()
    with pytest.raises(ValueError, match="storage must be one of device, host, file, found 'disk'"):
        PartialFC(10, 4, objective=objective, storage="disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="storage file needs storage_dir"):
        PartialFC(10, 4, objective=objective, storage="file")
    head = PartialFC(10, 4, objective=objective, storage="host")
    with pytest.raises(
        ValueError, match=r"no place for momentum \[4\] of each row: give PartialFC a row_state, RowSGD"
    ):
        RowSGD(head, 0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"cannot become torch\.float64"):
        head.double()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        PartialFC(10, 4, objective=objective, storage="file", storage_dir=tmp_path)
    assert str(tmp_path) in str(caught.value.filename)
    assert list(tmp_path.iterdir()) == []
