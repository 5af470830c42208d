"""What a protocol compares: its images, or the templates that they are pooled into."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...data.errors import UsageError
from ...data.protocols.table import ROLES, Protocol
from .search import Ints, unit
from .templates import pool


def check_embeddings(protocol: Protocol, embeddings: Tensor) -> None:
    """UsageError where there is not one for each image, or one is not finite."""
    if len(embeddings) != len(protocol):
        raise UsageError(
            f"{protocol.name}: {len(embeddings):,} embeddings for {len(protocol):,} images: give one for each "
            "row of the table, in its order"
        )
    broken = (~torch.isfinite(embeddings).all(dim=1)).nonzero()[:, 0].tolist()
    if broken:
        raise UsageError(
            f"{protocol.name}: {len(broken):,} of {len(protocol):,} embeddings are not finite, the first is that of "
            f"{protocol.images[broken[0]]}"
        )


@dataclass(frozen=True)
class Items:
    """What is compared: templates, or images. ``row`` is a row of the table that shows each."""

    unit: Tensor
    row: Ints
    identity: Ints
    role: Ints
    camera: Ints | None
    gallery: Ints | None
    code: Ints
    """Of a pair's side → the item."""

    def of(self, role: str) -> Ints:
        return np.flatnonzero(self.role == ROLES.index(role))


def items_of(protocol: Protocol, embeddings: Tensor) -> Items:
    """The images, or their templates; UsageError where a template has no embedding."""
    if protocol.template is None:
        every = np.arange(len(protocol))
        columns = protocol.identity, protocol.role, protocol.camera, protocol.gallery
        return Items(unit(embeddings), every, *columns, every)
    try:
        pooled = pool(embeddings, protocol.template, protocol.media, protocol.weight)
    except UsageError as error:
        raise UsageError(f"{protocol.name}: {error}") from None
    if not torch.isfinite(pooled).all():
        raise UsageError(
            f"{protocol.name}: embeddings times their weights are too large for float32: scale the weights"
        )
    _, row = np.unique(protocol.template, return_index=True)
    columns = (
        None if codes is None else codes[row]
        for codes in (protocol.identity, protocol.role, protocol.camera, protocol.gallery)
    )
    return Items(pooled, row, *columns, np.arange(len(row)))  # type: ignore[arg-type]


def identities_of(items: Items, first: Ints, second: Ints, same: NDArray[np.bool_]) -> Ints:
    """Of each item [n], for the bootstrap: what the table says, and those that pairs of one identity join are one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if (items.identity >= 0).all():
        return items.identity
    known = np.flatnonzero(items.identity >= 0)
    number = len(items.identity)
    one = np.concatenate([first[same], known])
    other = np.concatenate([second[same], number + items.identity[known]])  # an identity is a node of its own
    nodes = number + int(items.identity.max(initial=-1)) + 1
    joined = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(nodes, nodes))
    return connected_components(joined, directed=False)[1][:number].astype(np.int64)
