"""A backbone sharded by FSDP2 beside the head, each with a process group of its own.

torchrun --nproc-per-node 2 examples/fsdp2_loop.py

The backbone's mesh is the data-parallel one. The head's group has the same ranks: its collectives run while FSDP's do,
in another order, so the two must not share a communicator.
"""

import os

import torch
import torch.distributed as dist
from problem import BATCH, DIM, IDENTITIES, Images, network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from pfc.partial_fc import PartialFC, RowSGD, objectives

kind = "cuda" if torch.cuda.is_available() else "cpu"
device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
dist.init_process_group()
mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("data",))
head_group = dist.new_group()

backbone = network().to(device)
for layer in backbone:
    if list(layer.parameters()):
        fully_shard(layer, mesh=mesh["data"])
fully_shard(backbone, mesh=mesh["data"])
objective = objectives.CosFace(scale=16.0)
head = PartialFC(IDENTITIES, DIM, objective=objective, sample_rate=0.25, device=device, process_group=head_group)
optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
head_optimizer = RowSGD(head, lr=0.1)

loader = DataLoader(Images(), BATCH, sampler=DistributedSampler(Images(), shuffle=False))
for step, (images, labels) in enumerate(loader):
    loss = head(backbone(images.to(device)), labels.to(device))
    loss.backward()
    for one in (optimizer, head_optimizer):
        one.step()
        one.zero_grad()
    if dist.get_rank() == 0 and step % 10 == 9:
        print(f"step {step + 1}: loss {loss:.5f}", flush=True)
dist.destroy_process_group()
