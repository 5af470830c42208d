"""Fifty steps of a small network under DDP and the head, on 1, 2 and 3 ranks, beside the oracle's own fifty."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pfc.partial_fc import PartialFC, RowSGD, objectives
from pfc.partial_fc.objectives.state import ObjectiveState
from tests.partial_fc.oracle import dense_loss
from tests.ranks import run_ranks

STEPS, BATCH, CLASSES, INPUT, DIM = 50, 12, 103, 20, 16
LR, MOMENTUM, DECAY = 0.05, 0.9, 1e-3
CENTER_STD = 0.1


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUT, 32), nn.Tanh(), nn.Linear(32, DIM))


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [STEPS, BATCH, INPUT], labels [STEPS, BATCH], first centers [CLASSES, DIM]."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(STEPS, BATCH, INPUT, generator=generator),
        torch.randint(0, CLASSES, (STEPS, BATCH), generator=generator),
        torch.randn(CLASSES, DIM, generator=generator) * CENTER_STD,
    )


@dataclass(frozen=True)
class Run:
    """What is trained: an objective, on a sample of the classes, and centers a class."""

    name: str
    parameters: dict[str, float]
    sample_rate: float = 1.0
    sub_centers: int = 1


@dataclass
class Saved:
    """A run after some of its steps, the same on every rank and of any number of ranks."""

    losses: list[float]
    centers: Tensor
    network: dict[str, Any]
    head: dict[str, Any]
    optimizers: list[dict[str, Any]]


def train_on_rank(run: Run, saved: Saved | None = None, stop: int = STEPS) -> Saved:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    inputs, labels, centers = data()
    backbone = DistributedDataParallel(network())
    objective = objectives.build(run.name, **run.parameters)
    head = PartialFC(
        CLASSES, DIM, objective=objective, sample_rate=run.sample_rate, seed=5, sub_centers=run.sub_centers
    )
    head.load_centers(centers if run.sub_centers == 1 else first_centers(run))
    groups = [{"params": backbone.parameters()}, {"params": head.objective_state.learned(), "weight_decay": 0.0}]
    optimizers = [
        torch.optim.SGD(groups, LR, momentum=MOMENTUM, weight_decay=DECAY),
        RowSGD(head, LR, momentum=MOMENTUM, weight_decay=DECAY),
    ]
    losses = [] if saved is None else list(saved.losses)
    if saved is not None:
        backbone.module.load_state_dict(saved.network)
        head.load_state_dict(saved.head)
        for optimizer, state in zip(optimizers, saved.optimizers, strict=True):
            optimizer.load_state_dict(state)
    size = BATCH // world_size
    mine = slice(rank * size, (rank + 1) * size)
    for step in range(len(losses), stop):
        loss = head(backbone(inputs[step, mine]), labels[step, mine])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    states = [_whole(part.state_dict()) for part in (backbone.module, head, *optimizers)]
    return Saved(losses, head.centers.full_tensor().clone(), states[0], states[1], states[2:])


def _whole(tree: Any) -> Any:
    """With full tensors in place of sharded ones."""
    if isinstance(tree, dict):
        return {key: _whole(value) for key, value in tree.items()}
    if isinstance(tree, DTensor):
        return tree.full_tensor().clone()
    return tree.detach().clone() if isinstance(tree, Tensor) else tree


def first_centers(run: Run) -> Tensor:
    """[CLASSES, S, DIM]; the first of each class as without sub-centers."""
    _, _, centers = data()
    if run.sub_centers == 1:
        return centers
    others = torch.randn(CLASSES, run.sub_centers - 1, DIM, generator=torch.Generator().manual_seed(2)) * CENTER_STD
    return torch.cat([centers[:, None], others], dim=1)


def oracle_trajectory(run: Run) -> tuple[list[float], Tensor]:
    inputs, labels, _ = data()
    backbone, centers = network().double(), first_centers(run).double().requires_grad_()
    objective = objectives.build(run.name, **run.parameters)
    first = objective.first_state(max(2, round(CLASSES * run.sample_rate)))
    biases = {name: torch.tensor(first[name]).double().requires_grad_() for name in objective.learned}
    drawn = ObjectiveState(objective, CLASSES, torch.device("cpu"), torch.float64)
    averages: dict[str, Tensor] = {}
    groups = [{"params": [*backbone.parameters(), centers]}, {"params": [*biases.values()], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, LR, momentum=MOMENTUM, weight_decay=DECAY)
    losses = []
    for step in range(STEPS):
        embeddings = backbone(inputs[step].double())
        seen = drawn.numbers(objective, embeddings.detach(), seed=5, step=step, training=True)
        known: dict[str, Any] = {"noise": seen.noise, "biases": biases, "averages": averages}
        loss = dense_loss(run.name, run.parameters, embeddings, labels[step], centers, **known)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, centers.detach()


RUNS = [
    Run("arcface", {"scale": 16.0, "margin": 0.3}),
    Run("d_softmax", {"scale": 16.0, "stop": 0.9}),
    Run("p2sgrad", {}),
    Run("arcface", {"scale": 16.0, "margin": 0.3}, sub_centers=3),
    Run("adaface", {"scale": 16.0, "margin": 0.3, "concentration": 0.8, "momentum": 0.2}),
    Run("elastic_cosface", {"scale": 16.0, "margin": 0.3, "deviation": 0.05, "plus": False}),
    Run("curricularface", {"scale": 16.0, "margin": 0.3, "momentum": 0.1}),
    Run("uniface", {"scale": 16.0, "margin": 0.3, "power": 1.0, "balance": 0.5}),
]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_fifty_steps_follow_the_oracle_and_one_another(run: Run) -> None:
    oracle_losses, oracle_centers = oracle_trajectory(run)
    assert oracle_losses[-1] != pytest.approx(oracle_losses[0], rel=0.01), "fifty steps that change something"
    for world_size in (1, 2, 3):
        _compare(_run(world_size, run), oracle_losses, oracle_centers)
    sampled = replace(run, sample_rate=0.3)
    alone = _run(1, sampled)
    for world_size in (2, 3):
        _compare(_run(world_size, sampled), alone.losses, alone.centers)


@pytest.mark.parametrize("run", RUNS[3:], ids=str)
def test_another_number_of_ranks_goes_on_from_the_same_state(run: Run) -> None:
    run = replace(run, sample_rate=0.3)
    alone = _run(1, run)
    saved = _run(2, run, None, STEPS // 2)
    _compare(_run(3, run, saved), alone.losses, alone.centers)


def _compare(found: Saved, losses: list[float], centers: Tensor) -> None:
    assert found.losses == pytest.approx(losses, rel=1e-4)
    assert float((found.centers - centers).norm() / centers.norm()) < 1e-3


def _run(world_size: int, run: Run, saved: Saved | None = None, stop: int = STEPS) -> Saved:
    results = run_ranks(world_size, train_on_rank, run, saved, stop)
    for result in results:
        assert result.losses == results[0].losses, "the loss is the same on every rank"
        for name, value in results[0].head.items():
            assert torch.equal(torch.as_tensor(result.head[name]), torch.as_tensor(value)), name
    return results[0]
