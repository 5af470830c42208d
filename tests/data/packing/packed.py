"""Tiny images, packings that are killed, and what a packed data set holds, for the tests of packing."""

import io
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pfc.data import pack_folder
from pfc.data.errors import UsageError
from pfc.data.packing import run as pack_run
from pfc.data.records.dataset import RecordDataset

fork = multiprocessing.get_context("fork")


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


def make_source(root: Path, images: int = 40) -> Path:
    """Four identities; every seventh image cannot be read."""
    for i in range(images):
        folder = root / f"person-{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(jpeg(i) if i % 7 else b"no picture")
    return root


def pack_it(root: Path, out: Path, **options: Any) -> Any:
    return pack_folder(root, out, **({"size": 8, "shards": 3, "workers": 1, "name": "set"} | options))


def killed_at(
    call: int,
    owner: Any,
    name: str,
    function: Callable[..., Any],
    *arguments: Any,
    save_every: float = 0.0,
    **options: Any,
) -> bool:
    """Run ``function`` in a process of its own that dies at the given call of ``owner.name``; whether it did."""

    def run() -> None:
        pack_run.SAVE_EVERY = save_every
        original, calls = getattr(owner, name), 0

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                if name == "write":
                    args[0]._rec.write(b"half a record")
                    args[0]._rec.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, counting)
        function(*arguments, **options)

    process = fork.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0
