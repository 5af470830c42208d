"""Fifty steps of a small network under DDP and the head, on 1, 2 and 3 ranks, beside the oracle's own fifty."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pfc.partial_fc import PartialFC, RowSGD, objectives
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


def train_on_rank(name: str, parameters: dict[str, float], sample_rate: float) -> tuple[list[float], Tensor]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    inputs, labels, centers = data()
    backbone = DistributedDataParallel(network())
    head = PartialFC(CLASSES, DIM, objective=objectives.build(name, **parameters), sample_rate=sample_rate, seed=5)
    head.load_centers(centers)
    optimizers = [
        torch.optim.SGD(backbone.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY),
        RowSGD(head, LR, momentum=MOMENTUM, weight_decay=DECAY),
    ]
    size = BATCH // world_size
    mine = slice(rank * size, (rank + 1) * size)
    losses = []
    for step in range(STEPS):
        loss = head(backbone(inputs[step, mine]), labels[step, mine])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, head.weight.detach()


def oracle_trajectory(name: str, parameters: dict[str, float]) -> tuple[list[float], Tensor]:
    inputs, labels, first = data()
    backbone, centers = network().double(), first.double().requires_grad_()
    optimizer = torch.optim.SGD([*backbone.parameters(), centers], LR, momentum=MOMENTUM, weight_decay=DECAY)
    losses = []
    for step in range(STEPS):
        loss = dense_loss(name, parameters, backbone(inputs[step].double()), labels[step], centers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, centers.detach()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("arcface", {"scale": 16.0, "margin": 0.3}),
        ("d_softmax", {"scale": 16.0, "stop": 0.9}),
        ("p2sgrad", {}),
    ],
)
def test_fifty_steps_follow_the_oracle_and_one_another(name: str, parameters: dict[str, float]) -> None:
    oracle_losses, oracle_centers = oracle_trajectory(name, parameters)
    assert oracle_losses[-1] != pytest.approx(oracle_losses[0], rel=0.01), "fifty steps that change something"
    for world_size in (1, 2, 3):
        losses, centers = _run(world_size, name, parameters, 1.0)
        assert losses == pytest.approx(oracle_losses, rel=1e-4)
        assert float((centers - oracle_centers).norm() / oracle_centers.norm()) < 1e-3

    alone_losses, alone_centers = _run(1, name, parameters, 0.3)
    for world_size in (2, 3):
        losses, centers = _run(world_size, name, parameters, 0.3)
        assert losses == pytest.approx(alone_losses, rel=1e-4)
        assert float((centers - alone_centers).norm() / alone_centers.norm()) < 1e-3


def _run(world_size: int, name: str, parameters: dict[str, float], sample_rate: float) -> tuple[list[float], Tensor]:
    results = run_ranks(world_size, train_on_rank, name, parameters, sample_rate)
    for losses, _ in results:
        assert losses == results[0][0], "the loss is the same on every rank"
    return results[0][0], torch.cat([centers for _, centers in results])
