"""Embeddings that another program has made, judged by the same code."""

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ...data.errors import UsageError
from ...data.pairs.pairs import Pairs
from ...data.protocols.table import Protocol, encode
from .evaluate import VerificationResult
from .metrics import verification_metrics
from .search import unit
from .templates import cosines_of


@dataclass(frozen=True)
class Found:
    """Embeddings [N, D] float32; the images' names [N] and labels [N] where the file has them."""

    embeddings: Tensor
    names: list[str] | None
    labels: np.ndarray | None


def read_embeddings(path: Path) -> Found:
    """Of .npy (embeddings alone) or .npz (``embeddings``, and ``names`` or ``labels``), as ``pfc embed`` writes them.

    Raises:
        UsageError: it is no such file.
    """
    try:
        stored: Any = np.load(path)
        arrays = {"embeddings": stored} if isinstance(stored, np.ndarray) else {name: stored[name] for name in stored}
    except (ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} is no .npy or .npz file of numbers, or cut off: {error}") from None
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    arrays = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    found = arrays.get("embeddings")
    if found is None or found.ndim != 2 or not np.issubdtype(found.dtype, np.floating):
        held = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items())
        raise UsageError(f"{path} has no array embeddings [N, D] of floating-point numbers; it has: {held}")
    for name in ("names", "labels"):
        if name in arrays and arrays[name].shape != (len(found),):
            raise UsageError(f"{path}: {name} has the shape {list(arrays[name].shape)}, for {len(found):,} embeddings")
    names, labels = arrays.get("names"), arrays.get("labels")
    embeddings = torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))
    return Found(embeddings, None if names is None else [_text(name) for name in names.tolist()], labels)


def rows_of_table(path: Path, found: Found, protocol: Protocol) -> Tensor:
    """The embeddings in the table's order: by their names, or as they are where they have none."""
    if found.names is None:
        return found.embeddings  # as many as the table has rows, or the judge says so
    places = {name: place for place, name in enumerate(found.names)}
    if len(places) < len(found.names):
        twice = next(name for place, name in enumerate(found.names) if places[name] != place)
        raise UsageError(f"{path}: names has {twice} twice: give one embedding of each image")
    missing = [name for name in protocol.images if name not in places]
    if missing:
        raise UsageError(
            f"{path} has no embedding of {len(missing):,} of {len(protocol):,} images of {protocol.name}, the first is "
            f"{missing[0]}"
        )
    return found.embeddings[torch.tensor([places[name] for name in protocol.images])]


def protocol_of_labels(path: Path, found: Found) -> Protocol:
    """Each among all others, by the labels of the file itself; a number below 0, or none, is an unknown one."""
    if found.labels is None:
        raise UsageError(f"{path} has no labels: say what the embeddings are of with --protocol or --pairs")
    codes, names = encode([_text(label) for label in found.labels.tolist()])
    images = found.names or [str(number) for number in range(len(codes))]
    return Protocol(path.stem, path.parent, images, codes, np.zeros(len(codes), np.int64), names={"identity": names})


def _text(value: Any) -> str:
    """Of a name or a label; empty for what stands for none."""
    if isinstance(value, bytes):
        return os.fsdecode(value)
    return "" if isinstance(value, int | float) and not value >= 0 else str(value)


def judge_pairs(path: Path, found: Found, pairs: Pairs) -> dict[str, Any]:
    """The metrics of verification pairs, whose images 2i and 2i + 1 have the embeddings of these rows."""
    if len(found.embeddings) != 2 * len(pairs.same):
        raise UsageError(
            f"{path} has {len(found.embeddings):,} embeddings, {pairs.name} has {2 * len(pairs.same):,} images: "
            "give one for each, in their order"
        )
    if not torch.isfinite(found.embeddings).all():
        raise UsageError(f"{path}: some embeddings are not finite")
    first = np.arange(0, len(found.embeddings), 2)
    cosines = cosines_of(unit(found.embeddings), first, first + 1)
    try:
        metrics = verification_metrics(cosines, np.asarray(pairs.same, dtype=bool))
    except UsageError as error:
        raise UsageError(f"pairs {pairs.name!r}: {error}") from None
    told = VerificationResult(pairs.name, len(pairs.same), metrics, metrics.accuracy, metrics.accuracy).to_dict()
    return {name: value for name, value in told.items() if name not in ("accuracy_flip", "accuracy_noflip")}
