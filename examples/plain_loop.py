"""The head in a plain loop with DistributedDataParallel, saved and loaded with torch.distributed.checkpoint.

torchrun --nproc-per-node 2 examples/plain_loop.py [FOLDER of the checkpoint]
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from problem import BATCH, DIM, IDENTITIES, Images, network
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from pfc.partial_fc import PartialFC, RowSGD, objectives

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
dist.init_process_group()
loader = DataLoader(Images(), BATCH, sampler=DistributedSampler(Images(), shuffle=False))
backbone = DistributedDataParallel(network().to(device))
head = PartialFC(IDENTITIES, DIM, objective=objectives.CosFace(scale=16.0), sample_rate=0.25, device=device)
optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
head_optimizer = RowSGD(head, lr=0.1)

for step, (images, labels) in enumerate(loader):
    loss = head(backbone(images.to(device)), labels.to(device))  # the mean over the batches of all ranks
    loss.backward()
    for one in (optimizer, head_optimizer):
        one.step()
        one.zero_grad()
    if dist.get_rank() == 0 and step % 10 == 9:
        print(f"step {step + 1}: loss {loss:.5f}", flush=True)

if len(sys.argv) > 1:  # any number of ranks may load it
    state = {"backbone": backbone.module.state_dict(), "head": head.state_dict(), "rows": head_optimizer.state_dict()}
    dcp.save(state, checkpoint_id=sys.argv[1])
    dcp.load(state, checkpoint_id=sys.argv[1])
dist.destroy_process_group()
