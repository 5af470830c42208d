"""The head in Lightning: torchrun --nproc-per-node 2 examples/lightning_module.py

The head is no submodule: Lightning's DistributedDataParallel would copy the first rank's centers to all others, and
each rank has its own. Its optimizer is not Lightning's either, so both step by hand.
"""

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from problem import BATCH, DIM, IDENTITIES, Images, network
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from pfc.partial_fc import PartialFC, RowSGD, objectives


class Embedding(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone = network()
        self.shards: list[PartialFC] = []  # in a list, so that it is no submodule

    def setup(self, stage: str) -> None:  # when the ranks know each other
        objective = objectives.CosFace(scale=16.0)
        head = PartialFC(IDENTITIES, DIM, objective=objective, sample_rate=0.25, device=self.device)
        self.shards, self.head_optimizer = [head], RowSGD(head, lr=0.1)

    def training_step(self, batch: tuple[Tensor, Tensor], step: int) -> None:
        images, labels = batch
        loss = self.shards[0](self.backbone(images), labels)
        self.manual_backward(loss)
        for one in (self.optimizers(), self.head_optimizer):
            one.step()
            one.zero_grad()
        if self.global_rank == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {loss:.5f}", flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.backbone.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Images(), BATCH, sampler=DistributedSampler(Images(), shuffle=False))


trainer = Trainer(
    strategy="ddp",
    accelerator="auto",
    devices="auto" if torch.cuda.is_available() else 2,
    max_epochs=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    use_distributed_sampler=False,
)
trainer.fit(Embedding())
dist.destroy_process_group()
