"""Templates: several images and frames of one identity that are compared as one (Whitelam et al. 2017, "IJB-B")."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.errors import UsageError
from .search import Floats, Ints


def pool(embeddings: Tensor, template: Ints, media: Ints | None = None, weight: Floats | None = None) -> Tensor:
    """One embedding of length 1 for each template, float32 [T, D].

    The images' embeddings, not normalised, times their weights; their mean within each medium, so that the many frames
    of one video count as one image; the sum over the media; normalised.

    Args:
        embeddings: [N, D].
        template: of each image, int64 [N], 0 … T − 1, each with an image.
        media: of each image, int64 [N]; each image is its own where absent or −1.
        weight: of each image, such as its detector's score, float32 [N].

    Raises:
        UsageError: all images of a template have the weight 0.
    """
    scaled = embeddings.float()
    if weight is not None:
        scaled = scaled * torch.from_numpy(weight)[:, None]
        heaviest = np.zeros(int(template.max()) + 1, dtype=np.float32)
        np.maximum.at(heaviest, template, weight)
        if not heaviest.all():
            raise UsageError(f"all images of template number {int(np.argmin(heaviest))} have the weight 0")
    alone = np.arange(len(template)) + (0 if media is None else int(media.max()) + 1)
    of = alone if media is None else np.where(media < 0, alone, media)
    groups, first, inverse = np.unique(np.stack([template, of]), axis=1, return_index=True, return_inverse=True)
    inverse = torch.from_numpy(inverse.reshape(-1))
    sums = scaled.new_zeros(groups.shape[1], scaled.shape[1]).index_add_(0, inverse, scaled)
    means = sums / torch.bincount(inverse, minlength=groups.shape[1])[:, None]
    pooled = scaled.new_zeros(int(template.max()) + 1, scaled.shape[1])
    return F.normalize(pooled.index_add_(0, torch.from_numpy(template[first]), means), dim=1)


def cosines_of(
    embeddings: Tensor,
    first: Ints,
    second: Ints,
    *,
    block: int = 1 << 16,
    moved: Callable[[], object] = lambda: None,
) -> Floats:
    """Cosines of pairs of rows of [T, D], of length 1, float32 [P]."""
    found = np.empty(len(first), dtype=np.float32)
    if len(first) * 80 > len(embeddings) ** 2:  # all products cost less than reading the rows of each pair
        order = np.argsort(first, kind="stable")
        rows = max(1, min(1024, (block << 8) // len(embeddings)))
        starts = range(0, len(embeddings), rows)
        bounds = np.searchsorted(first[order], [*starts, len(embeddings)])
        for start, begin, end in zip(starts, bounds[:-1], bounds[1:], strict=True):
            moved()
            pairs = order[begin:end]
            products = (embeddings[start : start + rows] @ embeddings.T).numpy()
            found[pairs] = products[first[pairs] - start, second[pairs]]
        return found
    for at in range(0, len(first), block):
        moved()
        one, other = (embeddings[torch.from_numpy(places[at : at + block])] for places in (first, second))
        found[at : at + block] = (one * other).sum(dim=1).numpy()
    return found
