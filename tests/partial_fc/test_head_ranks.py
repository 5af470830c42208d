"""What the ranks of a head have in common, and what passes between them."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from pfc.partial_fc import PartialFC, objectives
from tests.partial_fc.cases import OBJECTIVES, Case, relative_error, step_on_rank, tensors
from tests.ranks import run_ranks


def test_bfloat16_on_the_way_between_the_ranks_stays_close() -> None:
    exact = run_ranks(2, _step_with_payload, None)
    rounded = run_ranks(2, _step_with_payload, torch.bfloat16)
    for value, reference in zip(rounded, exact, strict=True):
        assert 0 < relative_error(value, reference.double()) < 0.02
        assert value.dtype == torch.float32


def _step_with_payload(dtype: torch.dtype | None) -> torch.Tensor:
    head = PartialFC(40, 32, objective=objectives.DSoftmax(scale=8.0), payload_dtype=dtype)
    generator = torch.Generator().manual_seed(dist.get_rank())
    embeddings = torch.randn(4, 32, generator=generator).requires_grad_()
    head(embeddings, torch.randint(0, 40, (4,), generator=generator)).backward()
    assert embeddings.grad is not None
    return embeddings.grad


def test_the_same_centers_begin_whatever_the_world_size() -> None:
    whole = PartialFC(9001, 4, objective=objectives.Softmax(), seed=7).weight
    for world_size in (2, 3):
        parts = run_ranks(world_size, _initial_rows)
        assert torch.equal(torch.cat(parts), whole)
    assert len(whole.unique(dim=0)) == 9001, "no two centers begin alike"


def _initial_rows() -> torch.Tensor:
    return PartialFC(9001, 4, objective=objectives.Softmax(), seed=7).weight.detach()


def test_the_same_samples_and_losses_whatever_the_world_size() -> None:
    alone = _five_steps(6)
    for world_size in (2, 3):
        of_ranks = run_ranks(world_size, _five_steps, 6 // world_size)
        for step, (loss, classes, batch) in enumerate(alone):
            assert torch.equal(torch.cat([steps[step][1] for steps in of_ranks]), classes)
            assert torch.equal(of_ranks[0][step][2], batch)
            assert abs(of_ranks[0][step][0] - loss) <= 1e-12 * abs(loss)
    assert not torch.equal(alone[0][1], alone[1][1]), "another step, another sample"


def _five_steps(batch: int) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    head = PartialFC(
        9001, 8, objective=objectives.DSoftmax(), sample_rate=0.1, batch_rate=0.5, seed=3, center_dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(5):
        embeddings = torch.randn(6, 8, dtype=torch.float64, generator=generator)
        labels = torch.randint(0, 9001, (6,), generator=generator)
        mine = slice(rank * batch, (rank + 1) * batch)
        loss = head(embeddings[mine], labels[mine]).item()
        results.append((loss, head.last_sample.classes, head.last_sample.batch))
    return results


ONE_MORE = {
    "curricularface": "c10d.allreduce_",
    "mv_softmax": "c10d.allreduce_",
    "inter_top_k": "c10d._allgather_base_",
}
"""They must know z_y, or the nearest negatives of all ranks, before they change those."""


@pytest.mark.parametrize("name", objectives.names())
def test_a_step_has_three_collectives_or_four_whatever_the_world_size(name: str) -> None:
    expected = ["c10d._allgather_base_", "c10d._reduce_scatter_base_", "c10d.allreduce_"]
    expected += [ONE_MORE[name]] if name in ONE_MORE else []
    for world_size in (2, 3):
        for calls in run_ranks(world_size, _count_collectives, name):
            assert calls == sorted(expected)


def _count_collectives(name: str) -> list[str]:
    weights = torch.rand(20, generator=torch.Generator().manual_seed(0))
    head = PartialFC(20, 8, objective=objectives.build(name), sample_rate=0.5, class_weights=weights)
    embeddings = torch.randn(4, 8, requires_grad=True)
    with CommDebugMode() as communication:
        head(embeddings, torch.arange(4)).backward()
    counts = communication.get_comm_counts()
    return sorted(str(operation) for operation, count in counts.items() for _ in range(count))


def test_a_process_group_may_be_a_part_of_the_world() -> None:
    losses = run_ranks(3, _step_in_subgroup)
    case = Case("cosface", OBJECTIVES["cosface"])
    expected = run_ranks(2, step_on_rank, case)[0].loss
    assert torch.equal(losses[0], expected)
    assert torch.equal(losses[1], expected)
    assert losses[2] is None


def _step_in_subgroup() -> torch.Tensor | None:
    group = dist.new_group([0, 1])
    rank = dist.get_rank()
    if rank == 2:
        return None
    case = Case("cosface", OBJECTIVES["cosface"])
    embeddings, labels, centers = tensors(case, 2)
    head = PartialFC(case.num_classes, case.dim, objective=objectives.CosFace(), process_group=group)
    head.load_centers(centers.float())
    mine = slice(rank * case.batch, (rank + 1) * case.batch)
    return head(embeddings[mine].float(), labels[mine]).detach()


def test_a_label_outside_the_range_is_refused_on_every_rank() -> None:
    for message in run_ranks(2, _wrong_label):
        assert message == "label 20 (sample 1 of rank 1) lies outside [0, 20)"


def _wrong_label() -> str:
    head = PartialFC(20, 8, objective=objectives.CosFace())
    labels = torch.tensor([1, 20 if dist.get_rank() == 1 else 2])
    with pytest.raises(ValueError, match="outside") as caught:
        head(torch.randn(2, 8), labels)
    return str(caught.value)
