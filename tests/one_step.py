"""One step of the head, by a wheel that is installed, with torch alone.

python tests/one_step.py [compiled]        # compiled: the C passes must be there
"""

import sys

import torch

from pfc.partial_fc import PartialFC, RowSGD, objectives

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
head = PartialFC(num_classes=9, embedding_dim=4, objective=objectives.DSoftmax(scale=32.0, stop=0.9), sample_rate=0.5)
optimizer = RowSGD(head, lr=0.1)
head(torch.randn(3, 4, requires_grad=True), torch.tensor([0, 4, 8])).backward()
optimizer.step()
if "compiled" in sys.argv[1:]:
    from pfc.data.loading import plain
    from pfc.partial_fc.kernels import native

    assert plain.compiled()
    assert native.passes()
print(f"trained with {sys.modules['pfc.partial_fc'].__file__}")
