"""The sharded matrix: its cut, its DTensor, and checkpoints that open on any number of ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from pfc.partial_fc import PartialFC, RowSGD, objectives
from pfc.partial_fc.centers import ClassShard
from tests.ranks import run_ranks


@pytest.mark.parametrize(("num_classes", "world_size"), [(10, 3), (9, 4), (2, 3), (1, 1), (7, 7), (5, 4)])
def test_the_cut_is_that_of_torch_chunk(num_classes: int, world_size: int) -> None:
    chunks = torch.arange(num_classes).chunk(world_size)
    for rank in range(world_size):
        shard = ClassShard.of(num_classes, rank, world_size)
        expected = chunks[rank].tolist() if rank < len(chunks) else []
        assert list(range(shard.start, shard.stop)) == expected
        assert shard.rows == len(expected)


def test_centers_without_a_process_group() -> None:
    head = PartialFC(7, 3, objective=objectives.Softmax())
    assert torch.equal(head.centers.full_tensor(), head.weight)


def test_centers_are_one_dtensor_that_shares_memory() -> None:
    full = torch.arange(30.0).view(10, 3)
    for world_size in (2, 3):
        for gathered, shape in run_ranks(world_size, _load_and_gather, full):
            assert torch.equal(gathered, full * 2)
            assert shape == (10, 3)


def _load_and_gather(full: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    head = PartialFC(10, 3, objective=objectives.Softmax())
    head.load_centers(full)
    head.centers.to_local().mul_(2)  # the head's own memory
    return head.centers.full_tensor(), tuple(head.centers.shape)


def test_centers_can_be_loaded_block_by_block() -> None:
    for rows in run_ranks(3, _load_from_function):
        assert len(rows) > 0
    assert torch.equal(torch.cat(run_ranks(3, _load_from_function)), torch.arange(9001.0)[:, None].expand(-1, 2))


def _load_from_function() -> torch.Tensor:
    head = PartialFC(9001, 2, objective=objectives.Softmax())
    largest = []

    def block(start: int, stop: int) -> torch.Tensor:
        largest.append(stop - start)
        return torch.arange(start, stop).float()[:, None].expand(-1, 2)

    head.load_centers(block)
    assert max(largest) <= 4096
    return head.weight.detach()


def test_centers_of_the_wrong_shape_are_refused() -> None:
    head = PartialFC(7, 3, objective=objectives.Softmax())
    with pytest.raises(ValueError, match=r"centers must be \[7, 3\], found \[7, 2\]"):
        head.load_centers(torch.zeros(7, 2))
    with pytest.raises(ValueError, match=r"classes 0 to 7 must be \[7, 3\], found \[1, 3\]"):
        head.load_centers(lambda start, stop: torch.zeros(1, 3))


@pytest.mark.parametrize(("writers", "readers"), [(2, 3), (3, 1), (1, 2)])
def test_a_checkpoint_opens_on_any_number_of_ranks(tmp_path: Path, writers: int, readers: int) -> None:
    written = run_ranks(writers, _save, str(tmp_path))
    read = run_ranks(readers, _restore, str(tmp_path))
    for kind in (0, 1):  # centers, momentum
        assert torch.equal(torch.cat([part[kind] for part in read]), torch.cat([part[kind] for part in written]))
    assert (read[0][1] != 0).any()


def _make() -> tuple[PartialFC, RowSGD]:
    head = PartialFC(1003, 4, objective=objectives.CosFace(), sample_rate=0.5)
    return head, RowSGD(head, 0.1, momentum=0.9)


def _state(head: PartialFC, optimizer: RowSGD) -> dict[str, torch.Tensor]:
    return {"centers": head.centers, **optimizer.state_dict()["state"]}


def _save(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    head, optimizer = _make()
    head(torch.randn(4, 4), torch.tensor([1, 500, 700, 1002])).backward()
    optimizer.step()
    state = _state(head, optimizer)
    dcp.save(state, checkpoint_id=path)
    return head.weight.detach(), state["momentum"].to_local()


def _restore(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    head, optimizer = _make()
    head.weight.data.zero_()
    state = _state(head, optimizer)
    dcp.load(state, checkpoint_id=path)
    assert dist.get_world_size() >= 1
    return head.weight.detach(), state["momentum"].to_local()


# Fine-tuning: three classes leave, five are new, and the rest comes in another order.
OLD, NEW = 9001, 9003


def _mapping() -> torch.Tensor:
    mapping = torch.randperm(OLD, generator=torch.Generator().manual_seed(3))[: NEW - 5]
    return torch.cat([torch.tensor([-1, -1]), mapping, torch.tensor([-1, -1, -1])])


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_other_classes_go_on_with_what_was_learned(world_size: int, by_block: bool) -> None:
    mapping, old = _mapping(), torch.arange(2.0 * OLD).view(OLD, 2)
    initial = PartialFC(NEW, 2, objective=objectives.Softmax(), seed=1).weight
    expected = torch.where((mapping >= 0)[:, None], old[mapping.clamp_min(0)], initial)
    assert torch.equal(torch.cat(run_ranks(world_size, _load_mapped, by_block)), expected)


def _load_mapped(by_block: bool) -> torch.Tensor:
    old = torch.arange(2.0 * OLD).view(OLD, 2)
    head = PartialFC(NEW, 2, objective=objectives.Softmax(), seed=1)
    head.load_centers((lambda start, stop: old[start:stop]) if by_block else old, classes=_mapping())
    return head.weight.detach()


def test_fewer_classes_than_before() -> None:
    head = PartialFC(3, 2, objective=objectives.Softmax())
    head.load_centers(torch.arange(10.0).view(5, 2), classes=torch.tensor([4, 0, 4]))
    assert head.weight.tolist() == [[8, 9], [0, 1], [8, 9]]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (torch.tensor([0, 1]), r"classes must be int64 \[3\], found \[2\]"),
        (torch.tensor([0.0, 1, 2]), r"classes must be int64 \[3\], found \[3\] torch.float32"),
        (torch.tensor([0, 1, 5]), r"classes must lie in \[-1, 5\), found 0 to 5"),
        (torch.tensor([0, -2, 1]), r"classes must lie in \[-1, 5\), found -2 to 1"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(classes: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartialFC(3, 2, objective=objectives.Softmax()).load_centers(torch.zeros(5, 2), classes)


def test_state_dict_brings_centers_and_position_back() -> None:
    for world_size in (1, 2):
        for same in run_ranks(world_size, _through_state_dict):
            assert same


def _through_state_dict() -> bool:
    head, other = (PartialFC(11, 4, objective=objectives.CosFace(), sample_rate=0.5, seed=seed) for seed in (1, 2))
    head(torch.randn(2, 4), torch.tensor([3, 10]))
    model = torch.nn.ModuleDict({"head": head})  # below another module, under a prefix
    torch.nn.ModuleDict({"head": other}).load_state_dict(model.state_dict())
    assert sorted(model.state_dict()) == ["head.centers", "head.steps"]
    return torch.equal(head.weight, other.weight) and other.steps == 1


def test_a_state_of_other_classes_is_refused() -> None:
    small, large = (PartialFC(count, 4, objective=objectives.CosFace()) for count in (10, 11))
    small(torch.randn(2, 4), torch.tensor([3, 9]))
    with pytest.raises(RuntimeError, match=r"expected \[11, 4\], found \[10, 4\]; load_centers takes centers of other"):
        large.load_state_dict(small.state_dict())
    assert large.steps == 0, "nothing of it is taken"
    with pytest.raises(RuntimeError, match=r"Missing key.*steps"):
        small.load_state_dict({"centers": small.centers})
