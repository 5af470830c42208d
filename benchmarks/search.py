"""A search of a large gallery: its time and memory, beside the products alone and faiss where it is installed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch

from ..engine.evaluation.search import count_others, find_mates, nearest, unit
from .ranks import OwnMemory

_K = 10


@dataclass(frozen=True)
class SearchTiming:
    """Attributes: ``seconds``; ``ratio`` to the products alone, in the same run; ``peak``, bytes besides the rows."""

    what: str
    seconds: float
    ratio: float
    peak: int


def measure(gallery: int, probes: int, dim: int, memory: int, tell: Callable[[str], None]) -> list[SearchTiming]:
    """Ranks of every probe's mate among the gallery, the nearest ten, and what they are compared with.

    Args:
        gallery, probes: rows of random unit vectors; each probe has one mate, at a cosine of about 0.5.
        memory: bytes to work in.
        tell: called with what is measured next.
    """
    random = torch.Generator().manual_seed(0)
    held = torch.empty(gallery, dim)
    for at in range(0, gallery, 1 << 16):
        held[at : at + (1 << 16)] = unit(torch.randn(min(1 << 16, gallery - at), dim, generator=random))
    ids = np.arange(gallery, dtype=np.int64)
    wanted = np.sort(np.random.default_rng(0).permutation(gallery)[:probes])
    queries = unit(held[torch.from_numpy(wanted)] + 1.7 * unit(torch.randn(probes, dim, generator=random)))
    block = max(1, min(memory, 1 << 24) // (24 * 1024))

    def products() -> None:
        for begin in range(0, probes, 1024):
            for at in range(0, gallery, block):
                torch.mm(queries[begin : begin + 1024], held[at : at + block].T)

    def identify() -> None:
        mates = find_mates(queries, wanted, held, ids, memory=memory)
        count_others(queries, wanted, held, ids, mates, memory=memory)

    lines: list[tuple[str, Callable[[], object]]] = [
        ("products alone", products),
        ("ranks of the mates, best others", identify),
        (f"nearest {_K}", lambda: nearest(queries, held, _K, memory=memory)),
    ]
    if find_spec("faiss") is not None:
        faiss = import_module("faiss")
        index = faiss.IndexFlatIP(dim)
        index.add(held.numpy())
        lines.append((f"faiss IndexFlatIP, nearest {_K}", lambda: index.search(queries.numpy(), _K)))
    found: list[SearchTiming] = []
    for what, work in lines:
        tell(what)
        with OwnMemory() as own:
            begun = time.monotonic()
            work()
            seconds = time.monotonic() - begun
        found.append(SearchTiming(what, seconds, seconds / (found[0].seconds if found else seconds), own.peak))
    return found
