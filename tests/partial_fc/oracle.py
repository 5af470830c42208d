"""The judge of the head: each objective as its paper writes it, dense, in float64, on one process, with autograd."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


def dense_loss(
    name: str,
    parameters: dict[str, float],
    embeddings: Tensor,
    labels: Tensor,
    centers: Tensor,
    *,
    classes: Tensor | None = None,
    batch: Tensor | None = None,
) -> Tensor:
    """The mean loss of the global batch.

    Args:
        embeddings: [B, D]; centers: [C, D]; both float64, not normalised.
        classes: ids of the sampled classes, among them every label; all when None.
        batch: places in the batch that meet the negatives; all when None.
    """
    num_classes = len(centers)
    classes = torch.arange(num_classes) if classes is None else classes
    batch = torch.arange(len(labels)) if batch is None else batch
    cosines = normalize(embeddings) @ normalize(centers).T  # [B, C]
    target = cosines[torch.arange(len(labels)), labels]
    used = torch.zeros(num_classes, dtype=torch.bool)
    used[classes] = True
    assert used[labels].all(), "the classes of the batch belong to every sample"
    negative = used & ~one_hot(labels, num_classes).bool()  # [B, C]
    if "filter" in parameters:
        negative &= cosines <= parameters["filter"]
    parts = _separable(name, parameters, cosines, target, negative)
    if parts is not None:
        pull, push = parts
        return pull.mean() + push[batch].mean()
    scale = parameters["scale"]
    shifted = scale * _with_margin(name, parameters, target)[:, None]
    # −log(e^{t} / (e^{t} + Σ e^{s·z_k})) with t the target's logit, written so that small losses keep their digits.
    losses = torch.log1p((torch.exp(scale * cosines - shifted) * negative).sum(dim=1))
    return losses[batch].mean()


def _separable(
    name: str, parameters: dict[str, float], cosines: Tensor, target: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor] | None:
    if name == "d_softmax":
        scale = parameters["scale"]
        epsilon = math.exp(scale * parameters["stop"])
        pull = torch.log1p(epsilon / torch.exp(scale * target))
        push = torch.log1p((torch.exp(scale * cosines) * negative).sum(dim=1))
        return pull, push
    if name == "p2sgrad":
        return 0.5 * (target - 1) ** 2, 0.5 * (cosines**2 * negative).sum(dim=1)
    return None


def _with_margin(name: str, parameters: dict[str, float], target: Tensor) -> Tensor:
    """What takes the place of the target's cosine, by each paper's formula on its whole range."""
    theta = torch.acos(target)
    if name == "softmax":
        return target
    if name == "cosface":
        return target - parameters["margin"]
    if name == "arcface":
        return _continued_cosine(theta + parameters["margin"])
    if name == "sphereface":
        return _continued_cosine(parameters["margin"] * theta)
    if name == "combined":
        return _continued_cosine(parameters["m1"] * theta + parameters["m2"]) - parameters["m3"]
    raise AssertionError(name)


def _continued_cosine(angle: Tensor) -> Tensor:
    """(−1)^j cos t − 2j on [jπ, (j+1)π], interval by interval."""
    result = torch.empty_like(angle)
    for j in range(int(angle.detach().max() / math.pi) + 1):
        inside = (angle >= j * math.pi) & (angle < (j + 1) * math.pi)
        result = torch.where(inside, (-1) ** j * torch.cos(angle) - 2 * j, result)
    return result
