"""What all examples train on: made-up images of 200 identities, and a small network. Replace both by your own."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

IDENTITIES, DIM, BATCH, STEPS = 200, 32, 16, 40


class Images(Dataset):
    """A picture of random numbers for each identity, and noise over it."""

    def __len__(self) -> int:
        return 2 * STEPS * BATCH

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        label = int(torch.randint(IDENTITIES, (), generator=generator))
        picture = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(10**6 + label))
        return picture + 0.3 * torch.randn(3, 16, 16, generator=generator), label


def network() -> nn.Module:
    """images [b, 3, 16, 16] → embeddings [b, DIM]"""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.PReLU(16), nn.Conv2d(16, 32, 3, 2, 1), nn.PReLU(32))
    return nn.Sequential(layers, nn.Flatten(), nn.Linear(32 * 16, DIM))
