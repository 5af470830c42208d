"""The objectives: each a small differentiable function of a few numbers per sample (``Numbers``).

With the cosine z_k between a normalised embedding and the normalised center of class k, and the label y, the head
computes for every sample

* ``target``    = z_y, and
* ``negatives`` = ℓ = log Σ_{k≠y} exp(s·z_k) for a LogSumExpObjective, q = Σ_{k≠y} z_k² for a SquaresObjective,
  Σ_{k≠y} softplus(s·g(z_k) + b) for a SoftplusObjective,

the sums taken over the classes of the step's sample. An objective never sees the class axis. Its loss is the sum of

* ``intra``: what pulls the sample to its own center, a mean over the whole batch, and
* ``inter``: what pushes it from the others, a mean over the part of the batch that meets the negatives (all of it
  unless ``batch_rate`` < 1, D-Softmax-B).

It may also see the embedding's norm, random numbers, and a few numbers that the head keeps for it; and it may change
the cosines of hard negatives. base.py has what they are made of, schedules.py numbers that follow the steps;
margins.py, quality.py, hard.py and binary.py have the objectives.
"""

import dataclasses
from types import NoneType
from typing import Any, get_args, get_type_hints

from .base import LogSumExpObjective, Numbers, Objective, SoftplusObjective, SquaresObjective, angle, psi, softplus
from .binary import SphereFace2, UniFace
from .hard import CurricularFace, InterTopK, MVSoftmax
from .margins import (
    ArcFace,
    Combined,
    CosFace,
    DSoftmax,
    ElasticArcFace,
    ElasticCosFace,
    P2SGrad,
    Softmax,
    SphereFace,
)
from .quality import AdaFace, MagFace
from .schedules import Schedule

__all__ = [
    "AdaFace", "ArcFace", "Combined", "CosFace", "CurricularFace", "DSoftmax", "ElasticArcFace", "ElasticCosFace",
    "InterTopK", "LogSumExpObjective", "MVSoftmax", "MagFace", "Numbers", "Objective", "P2SGrad", "Schedule",
    "Softmax", "SoftplusObjective", "SphereFace", "SphereFace2", "SquaresObjective", "UniFace",
    "angle", "build", "names", "psi", "register", "softplus",
]  # fmt: skip

_BY_NAME: dict[str, type[Objective]] = {
    "softmax": Softmax,
    "cosface": CosFace,
    "arcface": ArcFace,
    "sphereface": SphereFace,
    "combined": Combined,
    "d_softmax": DSoftmax,
    "p2sgrad": P2SGrad,
    "adaface": AdaFace,
    "magface": MagFace,
    "elastic_arcface": ElasticArcFace,
    "elastic_cosface": ElasticCosFace,
    "curricularface": CurricularFace,
    "mv_softmax": MVSoftmax,
    "inter_top_k": InterTopK,
    "sphereface2": SphereFace2,
    "uniface": UniFace,
}


def register(name: str, kind: type[Objective]) -> None:
    """Makes an objective of one's own known to ``build``, and so to configurations, under a name.

    Args:
        kind: a frozen dataclass whose fields are its parameters, numbers or booleans with defaults.
    """
    _BY_NAME[name] = kind


def names() -> list[str]:
    """The objectives that ``build`` knows."""
    return list(_BY_NAME)


def build(name: str, **parameters: Any) -> Objective:
    """The objective of that name, as configurations write it.

    Args:
        parameters: its fields; in place of a number may stand the entries of a ``Schedule``, a dict.

    Raises:
        ValueError: unknown name, unknown parameter, or a value outside its range; the text says what is allowed.
    """
    if name not in _BY_NAME:
        raise ValueError(f"unknown objective {name!r}; allowed: {', '.join(_BY_NAME)}")
    kind = _BY_NAME[name]
    hints = get_type_hints(kind)
    allowed = [field.name for field in dataclasses.fields(kind) if field.init]
    for key, value in parameters.items():
        if key not in allowed:
            raise ValueError(f"{name} has no parameter {key!r}; allowed: {', '.join(allowed) or 'none'}")
        parameters[key] = _checked(hints[key], key, value)
    return kind(**parameters)


def _checked(hint: Any, name: str, value: Any) -> Any:
    """The value as a field of that type takes it."""
    kinds = get_args(hint) or (hint,)
    if value is None and NoneType in kinds:
        return None
    if isinstance(value, dict) and float in kinds:
        return Schedule.of(name, value)
    if bool in kinds:
        expected, fits = "true or false", isinstance(value, bool)
    elif float in kinds:
        expected, fits = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    else:
        expected, fits = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    if not fits:
        raise ValueError(f"{name} must be {expected}{' or null' if NoneType in kinds else ''}, found {value!r}")
    return value
