"""The head with Accelerate: torchrun --nproc-per-node 2 examples/accelerate_loop.py, or accelerate launch.

Accelerate prepares the backbone, its optimizer and the data. The head is sharded already, so it is not prepared.
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from problem import BATCH, DIM, IDENTITIES, Images, network
from torch.utils.data import DataLoader

from pfc.partial_fc import PartialFC, RowSGD, objectives

accelerator = Accelerator(cpu=not torch.cuda.is_available())
backbone = network()
optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
backbone, optimizer, loader = accelerator.prepare(backbone, optimizer, DataLoader(Images(), BATCH))
objective = objectives.CosFace(scale=16.0)
head = PartialFC(IDENTITIES, DIM, objective=objective, sample_rate=0.25, device=accelerator.device)
head_optimizer = RowSGD(head, lr=0.1)

for step, (images, labels) in enumerate(loader):
    loss = head(backbone(images), labels)
    accelerator.backward(loss)
    for one in (optimizer, head_optimizer):
        one.step()
        one.zero_grad()
    if accelerator.is_main_process and step % 10 == 9:
        print(f"step {step + 1}: loss {loss:.5f}", flush=True)
dist.destroy_process_group()
