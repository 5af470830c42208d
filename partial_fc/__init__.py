"""The sharded classification head. It needs torch and nothing else, and works in any trainer:

from pfc.partial_fc import PartialFC, RowSGD, objectives

head = PartialFC(num_classes=1_000_000, embedding_dim=512, objective=objectives.CosFace(), sample_rate=0.1)
optimizer = RowSGD(head, lr=0.1, momentum=0.9, weight_decay=5e-4)
loss = head(embeddings, labels)
loss.backward()
optimizer.step()
optimizer.zero_grad()
"""

from . import objectives
from .head import PartialFC
from .optim import RowAdagrad, RowAdamW, RowOptimizer, RowSGD
from .row_gradient import RowGradient
from .sampling import LastSample

__all__ = ["LastSample", "PartialFC", "RowAdagrad", "RowAdamW", "RowGradient", "RowOptimizer", "RowSGD", "objectives"]
