"""Tiny images, and what a packed data set holds, for the tests of packing."""

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pfc.data.errors import UsageError
from pfc.data.records.dataset import RecordDataset


def jpeg(seed: int, *, width: int = 8, height: int = 8, kind: str = "JPEG") -> bytes:
    """An encoded image that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def contents(path: Path) -> Counter[tuple[str, bytes]]:
    """How often each (identity's name, or its label where there are no names; encoded image) is in a data set."""
    dataset = RecordDataset.open(path)
    names = dataset.identity_names()
    found: Counter[tuple[str, bytes]] = Counter()
    for i in range(len(dataset)):
        label, image = dataset.read(i)
        found[names[label] if names else str(label), image.tobytes()] += 1
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(pack: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The one line that ``pack`` refuses with."""
    with pytest.raises(UsageError) as caught:
        pack(*arguments, **({"workers": 1} | options))
    assert "\n" not in str(caught.value)
    return str(caught.value)
