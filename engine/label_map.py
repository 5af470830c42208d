"""Which identity each label is: what a run's centers belong to."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from ..data import GeneratedDataset, JointDataset
from ..data.errors import UsageError
from ..data.records.manifest import LABEL_NAMES_NAME
from .training_data import Dataset


def read_label_map(dataset: Dataset) -> bytes | None:
    """The names of all identities by label, a JSON list, as ``pfc pack`` wrote it; None where it did not.

    Of several sets, the list of their lists.
    """
    if isinstance(dataset, JointDataset):
        parts = [read_label_map(part) for part in dataset.sets]
        return None if None in parts else b"[" + b", ".join(part for part in parts if part is not None) + b"]"
    if isinstance(dataset, GeneratedDataset):
        return None
    folder = dataset.path if dataset.path.is_dir() else dataset.path.parent
    path = folder / LABEL_NAMES_NAME
    return path.read_bytes().strip() if path.is_file() else None


def hash_of(label_map: bytes | None) -> str | None:
    """By which two label maps are compared."""
    return None if label_map is None else hashlib.sha256(label_map).hexdigest()


def mapping(target: bytes | None, source: Path) -> Tensor:
    """For each label of the target the source's label of the same name, int64 [C]; -1 where it has none.

    Args:
        target: the label map of this run's data set.
        source: a checkpoint's ``labels.json``.

    Raises:
        UsageError: one of the two has no names, or they do not tell the identities apart.
    """
    if target is None:
        raise UsageError(
            "init.centers by_name: this run's data set has no names of identities (labels.json); 'pfc pack' writes them"
        )
    if not source.is_file():
        raise UsageError(
            f"init.centers by_name: {source} is missing: the run was trained on a data set without names of identities"
        )
    here, there = _names(target, "this run's data set"), _names(source.read_bytes(), str(source))
    places = {name: label for label, name in enumerate(there)}
    if len(places) != len(there):
        raise UsageError(f"init.centers by_name: {source}: two identities have the same name")
    return torch.tensor([places.get(name, -1) for name in here], dtype=torch.int64)


def _names(label_map: bytes, what: str) -> list[str]:
    try:
        names = json.loads(label_map)
    except ValueError as error:
        raise UsageError(f"init.centers by_name: the names of {what} cannot be read: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"init.centers by_name: {what} joins several sets, whose names may mean different identities: pack them "
            "into one with 'pfc pack recordio'"
        )
    return names
