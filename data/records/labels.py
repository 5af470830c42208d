"""How a class label is stored in an image record, and back.

``float32`` is MXNet's own way: one number. It is exact up to 2²⁴ identities and rounds beyond (16777217 reads
back as 16777216). ``float32x2`` stores two numbers, (label // 2²⁴, label % 2²⁴), each of them exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

LabelEncoding = Literal["float32", "float32x2"]

FLOAT32_EXACT = 1 << 24  # every integer up to here is a float32


def encoding_for(identities: int) -> LabelEncoding:
    """The plainest encoding that keeps the labels 0 … identities − 1 apart."""
    return "float32" if identities <= FLOAT32_EXACT else "float32x2"


def encode_label(label: int, encoding: LabelEncoding) -> float | tuple[float, float]:
    """The label as ``pack_image`` takes it."""
    if encoding == "float32":
        return float(label)
    high, low = divmod(label, FLOAT32_EXACT)
    return float(high), float(low)


def decode_label(labels: Sequence[float], encoding: LabelEncoding) -> int:
    """The label of an image record that holds ``labels``; of several float32 labels the first is the class.

    Raises ValueError where they are no label: not finite, negative, broken, rounded, or not in this encoding.
    """
    if encoding == "float32x2" and len(labels) != 2:
        raise ValueError(f"{len(labels)} label number(s) where the data set's encoding float32x2 has 2")
    stored = labels[:2] if encoding == "float32x2" else labels[:1]
    if not all(math.isfinite(number) and number >= 0 and number == int(number) for number in stored):
        raise ValueError(f"its label {', '.join(f'{number:g}' for number in stored)} is not a whole number from 0 on")
    if max(stored) >= FLOAT32_EXACT:
        raise ValueError(
            f"its label {max(stored):.0f} is not below {FLOAT32_EXACT}, from where on float32 rounds labels"
        )
    if encoding == "float32":
        return int(stored[0])
    return int(stored[0]) * FLOAT32_EXACT + int(stored[1])
