"""Evaluation of a backbone on verification pairs, spread over all ranks of the default process group."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...data.errors import UndecodableImage, UsageError
from ...data.loading.decoding import decode_images
from .metrics import VerificationMetrics, power_of_ten, verification_metrics

if TYPE_CHECKING:
    from ...data.pairs.pairs import Pairs

__all__ = ["VerificationMetrics", "VerificationResult", "embed_images", "evaluate_pairs", "verification_metrics"]

Encoded = bytes | np.ndarray


@dataclass(frozen=True)
class VerificationResult:
    """One evaluation of one set of pairs."""

    set: str
    pairs: int
    metrics: VerificationMetrics
    """With or without the mirror image's embedding added, as was asked for."""
    accuracy_flip: float
    """Accuracy with the mirror image's embedding added."""
    accuracy_noflip: float
    """Accuracy of the plain image's embedding alone."""

    def to_dict(self) -> dict[str, str | int | float]:
        """A flat object, as it stands in evaluation.jsonl; ``tar_at_far_1e-3`` only where the pairs allow it."""
        metrics = self.metrics
        return {
            "set": self.set,
            "pairs": self.pairs,
            "accuracy": metrics.accuracy,
            "accuracy_std": metrics.accuracy_std,
            "accuracy_flip": self.accuracy_flip,
            "accuracy_noflip": self.accuracy_noflip,
            "auc": metrics.auc,
            "eer": metrics.eer,
            "threshold": metrics.threshold,
        } | {f"tar_at_far_{power_of_ten(level)}": rate for level, rate in metrics.tar_at_far.items()}


def evaluate_pairs(
    model: nn.Module,
    pairs: Pairs,
    *,
    image_size: tuple[int, int],
    device: torch.device,
    batch_size: int = 128,
    flip: bool = True,
    threads: int = 2,
    moved: Callable[[], object] = lambda: None,
) -> tuple[VerificationResult, NDArray[np.float32]]:
    """Embeds the images of all pairs, each once, and compares those of every pair.

    All ranks of the default process group must call it together, with the same pairs; each embeds its part, and each
    gets the same result. Rank 0's BatchNorm statistics are used everywhere, as they are the ones that are saved. The
    model is in eval mode meanwhile and then as before. To evaluate in half precision, call it under torch.autocast.

    Args:
        model: images [b, 3, H, W] → embeddings [b, D], on ``device``.
        pairs: 2P encoded images and P booleans.
        image_size: (height, width) that the model was built for.
        device: where to decode and to compute.
        batch_size: images per forward pass. It may move the last digits of a result; the number of ranks does not.
        flip: whether the metrics are those of the image's and its mirror image's embeddings added, the custom for
            faces, or of the image's alone, for what a mirror makes something else of, such as writing.
        threads: decoding threads per rank.
        moved: called at every batch.

    Returns:
        the result, and the cosines [P] that its metrics are of, float32.

    Raises:
        UsageError: the pairs are too few or of one kind only.
        RuntimeError: an image cannot be decoded, or an embedding is not finite; raised on every rank.
    """
    places: dict[bytes, int] = {}  # an image that is in several pairs is embedded once
    which = [places.setdefault(image, len(places)) for image in pairs.images]
    try:
        views = _embed_views(
            model,
            list(places),
            flip=True,
            image_size=image_size,
            device=device,
            batch_size=batch_size,
            threads=threads,
            moved=moved,
        )
    except UndecodableImage as error:
        error.place = which.index(error.place)
        raise UsageError(f"pairs {pairs.name!r}: {error}; make the file again without that pair") from None
    views = views[:, which]
    broken = (~torch.isfinite(views).all(dim=2).all(dim=0)).nonzero().flatten().tolist()
    if broken:
        raise RuntimeError(
            f"evaluation on {pairs.name!r}: the embeddings of {len(broken)} of {views.shape[1]} images are not finite "
            f"(the first is image {broken[0]}), so training has diverged: "
            "lower the learning rate, or train with precision float32"
        )
    plain, flipped = _pair_cosines(views[0]), _pair_cosines(views.sum(dim=0))
    same = np.asarray(pairs.same, dtype=bool)
    try:
        without, with_flip = verification_metrics(plain, same), verification_metrics(flipped, same)
    except UsageError as error:
        raise UsageError(f"pairs {pairs.name!r}: {error}") from None
    metrics, cosines = (with_flip, flipped) if flip else (without, plain)
    return VerificationResult(pairs.name, len(same), metrics, with_flip.accuracy, without.accuracy), cosines


def embed_images(
    model: nn.Module,
    images: Sequence[Encoded],
    *,
    image_size: tuple[int, int],
    device: torch.device,
    batch_size: int = 128,
    flip: bool = True,
    threads: int = 2,
    moved: Callable[[], object] = lambda: None,
) -> Tensor:
    """Embeddings [N, D] of encoded images, float32 on the CPU, not normalised, in order and on every rank.

    With ``flip`` the embedding is the sum of the image's and its mirror image's. Otherwise as ``evaluate_pairs``.
    """
    views = _embed_views(
        model,
        images,
        flip=flip,
        image_size=image_size,
        device=device,
        batch_size=batch_size,
        threads=threads,
        moved=moved,
    )
    return views.sum(dim=0)


def _embed_views(
    model: nn.Module,
    images: Sequence[Encoded],
    *,
    flip: bool,
    image_size: tuple[int, int],
    device: torch.device,
    batch_size: int,
    threads: int,
    moved: Callable[[], object] = lambda: None,
) -> Tensor:
    """[V, N, D] on the CPU: V = 1, or 2 with the mirrored images' embeddings second."""
    if isinstance(model, DistributedDataParallel):
        model = model.module  # DDP's forward communicates, and ranks may have different numbers of batches
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    # Ranks share whole batches, so that every image is computed in the same company whatever the world size:
    # a matrix product's rounding depends on the batch it is done in.
    batches = -(-len(images) // batch_size)
    bounds = [min(batches * r // world_size * batch_size, len(images)) for r in range(world_size + 1)]
    start, stop = bounds[rank], bounds[rank + 1]

    def forward(batch: Tensor) -> Tensor:
        moved()
        views = [batch, batch.flip(3)] if flip else [batch]
        return torch.stack([model(view).float() for view in views])

    mine: Tensor | None = None
    problem: Exception | None = None
    with _eval_mode(model), _buffers_of_rank_zero(model, world_size), torch.inference_mode():
        try:
            if stop > start:
                decoded = decode_images(
                    images[start:stop], image_size=image_size, batch_size=batch_size, device=device, threads=threads
                )
                mine = torch.cat([forward(batch) for batch in decoded], dim=1)
        except UndecodableImage as error:
            problem = UndecodableImage(start + error.place, error.problem)
        except UsageError as error:
            problem = error
        except Exception as error:
            if world_size == 1:
                raise
            # Told to the others below: an exception here alone would leave them waiting.
            problem = RuntimeError(f"rank {rank} (images counted from {start}): {error}")
    if world_size == 1:
        if problem is not None:
            raise problem
        if mine is None:
            raise UsageError("there is no image to embed")
        return mine.cpu()
    return _gather(mine, problem, [b - a for a, b in itertools.pairwise(bounds)], device)


def _gather(mine: Tensor | None, problem: Exception | None, counts: list[int], device: torch.device) -> Tensor:
    """Every rank's [V, counts[r], D] → [V, N, D] on the CPU; or, on every rank, the first rank's problem."""
    states: list[tuple[Exception | None, tuple[int, ...] | None]] = [(None, None)] * len(counts)
    dist.all_gather_object(states, (problem, None if mine is None else tuple(mine.shape)))
    for told, _ in states:
        if told is not None:
            raise told
    shapes = [shape for _, shape in states if shape is not None]
    if not shapes:
        raise UsageError("there is no image to embed")
    views, _, embedding_dim = shapes[0]
    padded = torch.zeros(views, max(counts), embedding_dim, device=device)
    if mine is not None:
        padded[:, : mine.shape[1]] = mine
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:, :count].cpu() for part, count in zip(parts, counts, strict=True)], dim=1)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _buffers_of_rank_zero(model: nn.Module, world_size: int) -> Iterator[None]:
    """BatchNorm's running statistics differ between ranks (each has seen its own images): use one rank's meanwhile."""
    if world_size == 1:
        yield
        return
    buffers = list(model.buffers())
    own = [buffer.clone() for buffer in buffers]
    try:
        for buffer in buffers:
            dist.broadcast(buffer, src=0)
        yield
    finally:
        for buffer, value in zip(buffers, own, strict=True):
            buffer.copy_(value)


def _pair_cosines(embeddings: Tensor) -> NDArray[np.float32]:
    """[2P, D], pair i in rows 2i and 2i+1 → cosines [P]."""
    unit = F.normalize(embeddings, dim=1)
    return (unit[0::2] * unit[1::2]).sum(dim=1).numpy()
