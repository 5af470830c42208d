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
    noise: Tensor | None = None,
    weights: Tensor | None = None,
    biases: dict[str, Tensor] | None = None,
    averages: dict[str, Tensor] | None = None,
) -> Tensor:
    """The mean loss of the global batch, in the first step where ``averages`` is empty.

    Args:
        embeddings: [B, D]; centers: [C, D], or [C, S, D] of sub-centers; both float64, not normalised.
        classes: ids of the sampled classes, among them every label; all when None.
        batch: places in the batch that meet the negatives; all when None.
        noise: of random margins, [B].
        weights: of the classes, [C].
        biases: what an objective learns besides, each [].
        averages: moving ones, which this step moves.
    """
    num_classes = len(centers)
    classes = torch.arange(num_classes) if classes is None else classes
    batch = torch.arange(len(labels)) if batch is None else batch
    cosines = normalize(embeddings) @ normalize(centers.flatten(0, -2)).T  # [B, C], or [B, C·S]
    if centers.ndim == 3:
        cosines = cosines.view(len(labels), *centers.shape[:2]).amax(dim=2)
    target = cosines[torch.arange(len(labels)), labels]
    used = torch.zeros(num_classes, dtype=torch.bool)
    used[classes] = True
    assert used[labels].all(), "the classes of the batch belong to every sample"
    negative = used & ~one_hot(labels, num_classes).bool()  # [B, C]
    if "filter" in parameters:
        negative &= cosines <= parameters["filter"]
    weight = torch.ones_like(target) if weights is None else weights[labels]
    parts = _separable(name, parameters, cosines, target, negative, biases or {})
    if parts is not None:
        pull, push = parts
        return (weight * pull).mean() + (weight * push)[batch].mean()
    norms = embeddings.norm(dim=1)
    averages = {} if averages is None else averages
    logit = _with_margin(name, parameters, target, norms, noise, batch, averages)
    scale = parameters["scale"]
    if name == "curricularface":
        _move(averages, "t", 0.0, target.detach().mean(), parameters)
    others = _hard(name, parameters, cosines, logit.detach(), negative, averages)
    # −log(e^{t} / (e^{t} + Σ e^{s·z_k})) with t the target's logit, written so that small losses keep their digits.
    powers = torch.where(negative, torch.exp(scale * others - scale * logit[:, None]), 0.0)
    losses = weight * torch.log1p(powers.sum(dim=1))
    return losses[batch].mean() + (weight * _besides(name, parameters, norms)).mean()


def _move(averages: dict[str, Tensor], key: str, first: float, value: Tensor, parameters: dict[str, float]) -> None:
    """One step of a moving average; of several ranks it is the same, over the global batch."""
    alpha = parameters["momentum"]
    averages[key] = alpha * value + (1 - alpha) * averages.get(key, torch.tensor(first, dtype=value.dtype))


def _besides(name: str, parameters: dict[str, float], norms: Tensor) -> Tensor:
    """MagFace's reward of long embeddings."""
    if name != "magface":
        return torch.zeros_like(norms)
    least, most = parameters["least_norm"], parameters["most_norm"]
    bounded = norms.clamp(least, most)
    return parameters["regularizer"] * (1 / most**2 * bounded + 1 / bounded)


def _hard(
    name: str,
    parameters: dict[str, float],
    cosines: Tensor,
    logit: Tensor,
    negative: Tensor,
    averages: dict[str, Tensor],
) -> Tensor:
    """What the negatives count as, [B, C]."""
    harder = cosines > logit[:, None]
    if name == "curricularface":
        return torch.where(harder, cosines * (averages["t"] + cosines), cosines)
    if name == "mv_softmax":
        t = parameters["t"]
        changed = cosines + t * (cosines + 1) if parameters["adaptive"] else cosines + t
        return torch.where(harder, changed, cosines)
    if name == "inter_top_k":
        top = int(parameters["top_k"])
        nearest = torch.where(negative, cosines, -torch.inf).topk(min(top, cosines.shape[1]), dim=1).indices
        chosen = torch.zeros_like(negative).scatter_(1, nearest, True)
        inside = torch.where(negative, cosines, 0.0)  # arccos has no slope at 1
        return torch.where(chosen, torch.cos(torch.acos(inside) - parameters["hard_margin"]), cosines)
    return cosines


def _separable(
    name: str,
    parameters: dict[str, float],
    cosines: Tensor,
    target: Tensor,
    negative: Tensor,
    biases: dict[str, Tensor],
) -> tuple[Tensor, Tensor] | None:
    if name == "sphereface2":
        r, m, t, balance = (parameters[key] for key in ("scale", "margin", "power", "balance"))
        similarity = 2 * ((cosines + 1) / 2) ** t - 1
        own = 2 * ((target + 1) / 2) ** t - 1
        pull = balance / r * torch.log1p(torch.exp(-r * (own - m) - biases["bias"]))
        push = torch.log1p(torch.exp(r * (similarity + m) + biases["bias"]))
        return pull, (1 - balance) / r * (push * negative).sum(dim=1)
    if name == "uniface":
        s, m, balance = (parameters[key] for key in ("scale", "margin", "balance"))
        pull = torch.log1p(torch.exp(-(s * (target - m) - biases["threshold"])))
        push = torch.log1p(torch.exp(s * cosines - biases["threshold"]))
        return pull, balance * (push * negative).sum(dim=1)
    if name == "d_softmax":
        scale = parameters["scale"]
        epsilon = math.exp(scale * parameters["stop"])
        pull = torch.log1p(epsilon / torch.exp(scale * target))
        push = torch.log1p((torch.exp(scale * cosines) * negative).sum(dim=1))
        return pull, push
    if name == "p2sgrad":
        return 0.5 * (target - 1) ** 2, 0.5 * (cosines**2 * negative).sum(dim=1)
    return None


def _with_margin(
    name: str,
    parameters: dict[str, float],
    target: Tensor,
    norms: Tensor,
    noise: Tensor | None,
    batch: Tensor,
    averages: dict[str, Tensor],
) -> Tensor:
    """What takes the place of the target's cosine, by each paper's formula on its whole range."""
    theta = torch.acos(target)
    if name == "adaface":
        quality = _quality(parameters, norms.detach(), averages)
        margin = parameters["margin"]
        return _continued_cosine((theta - margin * quality).clip(min=0)) - (margin * quality + margin)
    if name == "magface":
        least, most = parameters["least_norm"], parameters["most_norm"]
        rise = (parameters["most_margin"] - parameters["least_margin"]) / (most - least)
        return _continued_cosine(theta + rise * (norms.clamp(least, most) - least) + parameters["least_margin"])
    if name in ("elastic_arcface", "elastic_cosface"):
        assert noise is not None
        margins = parameters["margin"] + parameters["deviation"] * noise
        if parameters["plus"]:  # the farther from its center, the larger: among the samples that meet the negatives
            margins = margins.clone()
            far_first = target.detach()[batch].argsort()
            margins[batch[far_first]] = margins[batch].sort(descending=True).values
        return _continued_cosine(theta + margins) if name == "elastic_arcface" else target - margins
    if name == "mv_softmax":
        return _continued_cosine(parameters["m1"] * theta + parameters["m2"]) - parameters["m3"]
    if name in ("curricularface", "inter_top_k"):
        return _continued_cosine(theta + parameters["margin"])
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


def _quality(parameters: dict[str, float], norms: Tensor, averages: dict[str, Tensor]) -> Tensor:
    safe = norms.clip(0.001, 100)
    if len(safe) > 1:
        _move(averages, "mean", 20.0, safe.mean(), parameters)
        _move(averages, "deviation", 100.0, safe.std(), parameters)
    mean, deviation = averages.get("mean", 20.0), averages.get("deviation", 100.0)
    return ((safe - mean) / (deviation + 0.001) * parameters["concentration"]).clip(-1, 1)


def _continued_cosine(angle: Tensor) -> Tensor:
    """(−1)^j cos t − 2j on [jπ, (j+1)π], interval by interval."""
    result = torch.empty_like(angle)
    first, last = (math.floor(float(end) / math.pi) for end in (angle.detach().min(), angle.detach().max()))
    for j in range(first, last + 1):
        inside = (angle >= j * math.pi) & (angle < (j + 1) * math.pi)
        result = torch.where(inside, (-1) ** j * torch.cos(angle) - 2 * j, result)
    return result
