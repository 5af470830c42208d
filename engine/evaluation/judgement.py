"""What a protocol says of embeddings, and how it is computed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .intervals import SAMPLES, Weights, over_identities
from .search import CPU, MEMORY, Ints


@dataclass
class Judgement:
    """What a protocol says of embeddings.

    Attributes:
        set: the protocol's name.
        counts: how many images, templates, probes, impostor pairs, ... the figures are of.
        figures: name → value.
        intervals: name → (low, high), 95 %, by the bootstrap over identities; not of every figure.
        curves: name → (x, y, low, high), float64 [4, n].
        worst: the mated probes that another beats by most, as rows of the table: (probe, what it was taken for, its
            best mate, the two cosines).
    """

    set: str
    counts: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    curves: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    worst: list[tuple[int, int, int, float, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A flat object, as it stands in evaluation.jsonl: intervals as ``NAME_low`` and ``NAME_high``."""
        low = {f"{name}_low": interval[0] for name, interval in self.intervals.items()}
        high = {f"{name}_high": interval[1] for name, interval in self.intervals.items()}
        return {"set": self.set, **self.counts, **self.figures, **low, **high}

    def add(self, ids: Sequence[Ints], figures: Callable[[Weights | None], dict[str, float]], how: "How") -> None:
        """Figures of weights, with their intervals; one called ``CURVE:X`` is a point of a curve."""
        values = figures(None)
        drawn = over_identities(ids, figures, samples=how.samples, moved=how.moved)
        intervals = {name: interval for name, interval in drawn.items() if name in values}
        points: dict[str, list[tuple[float, ...]]] = {}
        for name, value in values.items():
            curve, colon, x = name.partition(":")
            if colon:
                points.setdefault(curve, []).append((float(x), value, *intervals.pop(name, (np.nan, np.nan))))
            else:
                self.figures[name] = value
        self.intervals |= intervals
        self.curves |= {name: np.array(of, dtype=np.float64).T for name, of in points.items()}

    def save(self, file: IO[bytes]) -> None:
        """Writes all of it as one .npz."""
        told = {"set": self.set, "counts": self.counts, "figures": self.figures, "intervals": self.intervals}
        arrays: dict[str, Any] = {f"curve {name}": curve for name, curve in self.curves.items()}
        np.savez_compressed(file, about=json.dumps(told), worst=np.array(self.worst).reshape(-1, 5), **arrays)

    @staticmethod
    def of(arrays: Any) -> "Judgement":
        """What ``save`` wrote."""
        told = json.loads(str(arrays["about"]))
        worst = [(int(a), int(b), int(c), float(x), float(y)) for a, b, c, x, y in arrays["worst"]]
        curves = {name.removeprefix("curve "): arrays[name] for name in arrays.files if name.startswith("curve ")}
        return Judgement(**told, curves=curves, worst=worst)


@dataclass(frozen=True)
class How:
    """How to compute, the same on every rank: where, in how many bytes, and how many samples of the bootstrap."""

    device: torch.device = CPU
    memory: int = MEMORY
    samples: int = SAMPLES
    moved: Callable[[], object] = lambda: None

    @property
    def search(self) -> dict[str, Any]:
        """Arguments of every search."""
        return {"device": self.device, "memory": self.memory, "moved": self.moved}
