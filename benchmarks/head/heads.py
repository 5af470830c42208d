"""The heads that are measured, each with the optimizer that steps its centers."""

import importlib
import sys
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...partial_fc import PartialFC, RowAdagrad, RowSGD, objectives
from ...partial_fc.exchange import Exchange
from ...partial_fc.storage import Storage
from ..ceilings import DTYPES
from .case import HeadCase
from .dense import MARGIN, SCALE, DenseHead

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4


@dataclass(frozen=True)
class Head:
    """A module that gives the loss of embeddings [b, D] and labels int64 [b], and what steps its centers."""

    module: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def used_rows(self) -> int:
        """Centers that the last step used on this rank; 0 where the head does not say."""
        sample = self.module.last_sample if isinstance(self.module, PartialFC) else None
        return 0 if sample is None else len(sample.classes)

    def step(self, embeddings: Tensor, labels: Tensor) -> None:
        """Forward, backward, row update."""
        self.module(embeddings, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def build(case: HeadCase, device: torch.device) -> Head:
    """The head of a case, on one of its ranks."""
    module = {"pfc": _pfc, "dense": _dense, "peer": _peer}[case.head](case, device)
    if isinstance(module, PartialFC) and case.optimizer == "row_adagrad":
        return Head(module, RowAdagrad(module, weight_decay=WEIGHT_DECAY))
    return with_sgd(module)


def with_sgd(module: nn.Module) -> Head:
    """Centers are stepped by the same SGD whoever's they are: pfc's by ``RowSGD``, others by torch's."""
    if isinstance(module, PartialFC):
        return Head(module, RowSGD(module, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY))
    centers = [parameter for name, parameter in module.named_parameters() if name == "weight"]
    return Head(module, torch.optim.SGD(centers, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY))


class SimulatedExchange(Exchange):
    """That of one rank of a simulated world (``ranks.simulate_world``): labels of a whole global batch, and good news.

    The fake group hands back this rank's own samples as everybody's, so that a step would see b classes in place of
    those of B samples.

    Args:
        num_classes: C, from which labels are drawn uniformly.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def gather_batch(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        batch, gathered = super().gather_batch(embeddings, labels)
        return batch, torch.randint_like(gathered, self.num_classes)

    def sum_and_scatter(self, gradients: Tensor, broken: Tensor) -> tuple[Tensor, Tensor]:
        own, _ = super().sum_and_scatter(gradients, broken)
        return own, own.new_zeros(())  # a step that some rank calls broken would not be done


def _pfc(case: HeadCase, device: torch.device) -> nn.Module:
    adagrad = case.optimizer == "row_adagrad"
    head = PartialFC(
        case.classes,
        case.dim,
        objective=objectives.build(case.objective),
        sample_rate=case.rate,
        device=device,
        compute_dtype=DTYPES[case.precision],
        center_dtype=DTYPES[case.center_dtype],
        storage=cast(Storage, case.storage),
        storage_dir=case.storage_dir,
        row_state=RowAdagrad.row_state(case.dim) if adagrad else RowSGD.row_state(case.dim, momentum=MOMENTUM),
    )
    if case.simulated:
        head.exchange = SimulatedExchange(case.classes)
    return head


def _dense(case: HeadCase, device: torch.device) -> nn.Module:
    return DenseHead(case.classes, case.dim, DTYPES[case.precision], device)


def _peer(case: HeadCase, device: torch.device) -> nn.Module:
    """The common implementation's head, imported from the folder that the user names."""
    if device.type == "cpu":
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]  # it knows GPUs only
    sys.path.insert(0, case.peer)
    losses, module = importlib.import_module("losses"), importlib.import_module("partial_fc_v2")
    margin = losses.CombinedMarginLoss(SCALE, 1.0, 0.0, MARGIN)
    return module.PartialFC_V2(margin, case.dim, case.classes, case.rate, case.precision == "fp16").to(device).train()
