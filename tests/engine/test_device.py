"""What depends on the device, as far as a machine without a GPU can tell."""

import inspect
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pfc.data.errors import UsageError
from pfc.engine import device as devices
from pfc.engine.checkpoint import manager
from pfc.launch.console import find_device
from tests.engine.runs import configuration, new_trainer, pack, train
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("data"))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))


@pytest.mark.usefixtures("two_gpus")
def test_each_rank_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.local_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.local_device() == find_device("auto") == find_device("cuda") == torch.device("cuda", 1)
    assert find_device("cuda:0") == torch.device("cuda", 0)
    assert devices.backend(devices.local_device()) == "cpu:gloo,cuda:nccl"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="rank 2 of this machine has no GPU: PyTorch finds 2; start at most 2 rank"):
        devices.local_device()


@pytest.mark.parametrize("module", [torch.cpu, torch.cuda])
def test_both_kinds_of_device_take_the_calls_that_are_made(module: Any) -> None:
    device = torch.device("cuda", 1)
    for name in ("set_device", "synchronize"):
        inspect.signature(getattr(module, name)).bind(device)
    if module is torch.cuda:
        inspect.signature(module.get_rng_state).bind(device)
        inspect.signature(module.set_rng_state).bind(torch.get_rng_state(), device)
        for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
            inspect.signature(getattr(torch.accelerator, name)).bind(device)


def test_a_host_buffer_is_pinned_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not devices.host_buffer(torch.ones(3)).is_pinned()
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch, "empty", lambda *size, **options: asked.update(options))
    on_gpu = mock.Mock(shape=(3,), dtype=torch.int64, device=torch.device("cuda"))
    devices.host_buffer(on_gpu)
    assert asked == {"dtype": torch.int64, "pin_memory": True}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_random_states_come_back_to_the_device_they_are_of(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"cuda": torch.arange(3)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: told["cuda"])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: told.update({str(device): state}))
    device = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")
    states = devices.rng_states(device)
    assert list(states) == (["cpu", "cuda"] if kind == "cuda" else ["cpu"])
    first = torch.rand(())
    for name, state in {**states, "cuda": told["cuda"]}.items():
        devices.set_rng_state(name, state, device)
    assert torch.rand(()) == first
    assert list(told) == (["cuda", "cuda:0"] if kind == "cuda" else ["cuda"])


@pytest.mark.parametrize(("device", "last", "every"), [("cpu", False, 1), ("cuda", True, 10)])
def test_what_nobody_said_follows_from_the_device(device: str, last: bool, every: int) -> None:
    kind = torch.device(device)
    assert devices.channels_last(None, kind) == last
    assert devices.consult_every(None, kind) == every
    assert devices.channels_last(not last, kind) != last
    assert devices.consult_every(3, kind) == 3


def save_beside(tree: dict[str, Any]) -> tuple[list[str], list[str]]:
    """On a rank: which thread took which device in an asynchronous save."""
    taken: list[tuple[str, torch.device]] = []
    before = manager.devices
    trainer = new_trainer(tree)

    class Watched:
        host_buffer, synchronize = staticmethod(devices.host_buffer), staticmethod(devices.synchronize)

        @staticmethod
        def use(device: torch.device) -> None:
            import threading

            taken.append((threading.current_thread().name, device))

    manager.devices = Watched  # type: ignore[assignment]
    try:
        trainer.train_step()
        trainer.save()
        trainer.saving.saver.wait()
    finally:
        manager.devices = before
        trainer.close()
    return [name for name, _ in taken], [str(device) for _, device in taken]


def test_the_thread_of_an_asynchronous_save_takes_the_ranks_device(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, checkpoint={"asynchronous": True})
    for names, taken in run_ranks(2, save_beside, config.model_dump()):
        assert names == ["save-1"]
        assert taken == ["cpu"]


def drawn(tree: dict[str, Any]) -> float:
    trainer = new_trainer(tree)
    trainer.close()
    return float(torch.rand(()))


def test_ranks_draw_their_own_numbers(folder: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, drawn, configuration(folder, tmp_path).model_dump())
    assert first != second
    assert run_ranks(2, drawn, configuration(folder, tmp_path / "again").model_dump()) == [first, second]


def skipped_first(tree: dict[str, Any]) -> tuple[bool, list[float]]:
    """On a rank: the optimizers' state after a first step that is not finite, on memory that was used before."""
    for size in (8, 72, 100, 144, 512, 1024, 4096, 18432, 65536):
        junk = [torch.full((size,), 1e30) for _ in range(50)]
        del junk
    trainer = new_trainer(tree)
    if dist.get_rank() == 0:
        hook = trainer.network.register_forward_hook(lambda _module, _inputs, output: output * torch.nan)
    trainer.train_step()
    if dist.get_rank() == 0:
        hook.remove()
    state = [value for values in trainer.backbone_optimizer.state.values() for value in values.values()]
    zero = all(bool((value == 0).all()) for value in state)
    strides = all(
        values[key].stride() == parameter.stride()
        for parameter, values in trainer.backbone_optimizer.state.items()
        for key in values
        if values[key].ndim
    )
    losses = []
    for _ in range(3):
        trainer.train_step()
        losses.append(float(trainer.training_step.loss))
    trainer.close()
    assert int(trainer.skipped_steps) >= 1  # fp16 searches its scale, too
    return bool(state) and zero and strides, losses


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_skipped_first_step_leaves_zero_state(folder: Path, tmp_path: Path, name: str, precision: str) -> None:
    config = configuration(
        folder,
        tmp_path,
        optimizer={"backbone": {"name": name, "lr": 1e-3}},
        backbone={"channels_last": True},
        precision=precision,
    )
    for clean, losses in run_ranks(2, skipped_first, config.model_dump()):
        assert clean
        assert torch.isfinite(torch.tensor(losses)).all()


@pytest.mark.parametrize(
    ("section", "accumulate"), [({"static_graph": True}, 1), ({"payload_dtype": "bf16"}, 2), ({"compile": True}, 2)]
)
def test_ways_to_exchange_gradients_train_alike(
    folder: Path, tmp_path: Path, section: dict[str, Any], accumulate: int
) -> None:
    changes: dict[str, Any] = {"optimizer": {"accumulate": accumulate}, "schedule": {"steps": 3}}
    plain = train(2, configuration(folder, tmp_path / "plain", **changes))
    other = train(2, configuration(folder, tmp_path / "other", backbone=section, **changes))
    for name in ("loss", "gradient_norm"):
        assert [line[name] for line in other] == pytest.approx([line[name] for line in plain], rel=2e-2)


def built(tree: dict[str, Any]) -> tuple[bool, Any]:
    torch.backends.cudnn.benchmark = False
    trainer = new_trainer(tree)
    found = torch.backends.cudnn.benchmark, trainer.parts.head.compute_dtype
    trainer.close()
    return found


@pytest.mark.parametrize(
    ("products", "dtype"), [("float32", torch.float32), ("tf32", "tf32"), ("bf16", torch.bfloat16)]
)
def test_what_is_for_speed_is_set(folder: Path, tmp_path: Path, products: str, dtype: Any) -> None:
    config = configuration(folder, tmp_path, head={"products": products})
    assert run_ranks(1, built, config.model_dump()) == [(True, dtype)]


def test_the_ranks_may_consult_each_other_less_often(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, run={"consult_every_steps": 4})
    assert run_ranks(2, asked_to_stop, config.model_dump()) == [[4, 8], [4, 8]]


def asked_to_stop(tree: dict[str, Any]) -> list[int]:
    """On a rank: the steps after which a request that the other rank alone has is heard of."""
    trainer, heard = new_trainer(tree), []
    while trainer.step < trainer.total_steps:
        trainer.train_step()
        if trainer.consult(dist.get_rank()) is not None:
            heard.append(trainer.step)
    trainer.close()
    return heard
