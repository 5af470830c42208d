"""Verification sets: pairs of images and whether both show the same identity; the ``.bin`` files of the field.

A ``.bin`` is a pickle of (list of 2P encoded images, list of P booleans), where pair i is images 2i and 2i + 1. A
pickle from elsewhere can run any code, so it is read by an unpickler that knows plain data and nothing else.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic import replacing
from ..errors import UsageError
from ..order.orders import SampleOrder
from .plain_pickle import RefusedError, load_plain

if TYPE_CHECKING:
    from ..records.dataset import RecordDataset


@dataclass(frozen=True)
class Pairs:
    """A verification set of P pairs.

    Attributes:
        images: 2P encoded images; pair i is images 2i and 2i + 1.
        same: bool [P], whether the images of a pair show the same identity.
        name: what tables and plots call it.
    """

    images: list[bytes]
    same: np.ndarray
    name: str


def read_pairs(path: str | Path) -> Pairs:
    """Read a ``.bin`` file, of Python 2 or 3, without running code that it may carry.

    Raises:
        UsageError: the file is missing, asks for anything but plain data, or is no verification set.
    """
    path = Path(path)
    try:
        content = load_plain(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"verification set {path} does not exist: make one with `pfc pack pairs`") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is not a verification set but a directory: give a .bin file") from None
    except RefusedError as refused:
        raise UsageError(
            f"{path} was not loaded: it asks for {refused}, which a verification set does not need and which could "
            "run code; get the file from a source you trust or make one with `pfc pack pairs`"
        ) from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UsageError(f"{path} is not a verification set: it cannot be unpickled ({error})") from error
    if not isinstance(content, list | tuple) or len(content) != 2:
        raise UsageError(f"{path} is not a verification set: it does not hold (images, flags)")
    images, same = (list(part) if isinstance(part, list | tuple | np.ndarray) else [] for part in content)
    if not same or len(images) != 2 * len(same):
        raise UsageError(
            f"{path} is not a verification set: {len(images)} images and {len(same)} flags, where every flag needs "
            "two images"
        )
    encoded: dict[int, bytes] = {}  # each once, however often the pickle refers to it
    for place, image in enumerate(images):
        if id(image) not in encoded:
            encoded[id(image)] = _image_bytes(path, place, image)
    return Pairs(
        images=[encoded[id(image)] for image in images],
        same=np.array([_flag(path, place, flag) for place, flag in enumerate(same)], dtype=np.bool_),
        name=path.stem,
    )


def write_pairs(path: str | Path, pairs: Pairs) -> None:
    """Write a ``.bin`` file as the field's tools read it; complete or not at all.

    Raises:
        UsageError: the file exists already.
    """
    path = Path(path)
    if path.exists():
        raise UsageError(f"{path} exists already: name another file or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        pickle.dump((list(pairs.images), pairs.same.tolist()), file, protocol=4)


DEFAULT_PAIRS = 6000


def make_pairs(dataset: RecordDataset, num_pairs: int | None, seed: int) -> Pairs:
    """Choose pairs from a packed set: half of them match, no pair is repeated, and identities take turns.

    Args:
        dataset: at least two identities, one of them with two images.
        num_pairs: P; of an odd number the larger part does not match. None for 6,000, or as many as there are.
        seed: the choice is a function of the data set's labels, ``num_pairs`` and this.

    Raises:
        UsageError: the data set does not hold that many different pairs of either kind.
    """
    labels = dataset.labels()
    by_label = np.argsort(labels, kind="stable")
    identities = np.split(by_label, np.flatnonzero(np.diff(labels[by_label])) + 1)
    sizes = np.array([len(members) for members in identities], dtype=np.int64)
    positive = int((sizes * (sizes - 1) // 2).sum())
    negative = len(labels) * (len(labels) - 1) // 2 - positive
    if num_pairs is not None and num_pairs < 2:
        raise UsageError(
            f"{num_pairs} pairs asked for: a verification set needs at least 2, one that matches and one not"
        )
    if not positive:
        raise UsageError(f"data set {dataset.name!r}: no identity has two images, so no pair can match")
    if num_pairs is None:
        num_pairs = min(DEFAULT_PAIRS, 2 * min(positive, negative))
    num_positive = num_pairs // 2
    num_negative = num_pairs - num_positive
    if num_pairs == 0 or num_positive > positive or num_negative > negative:
        raise UsageError(
            f"data set {dataset.name!r}: {num_pairs} pairs asked for, but it holds {positive} different matching and "
            f"{negative} not matching ones: ask for at most {2 * min(positive, negative)}"
        )
    generator = np.random.default_rng(seed)
    chosen = _matching(identities, num_positive, generator) + _not_matching(identities, num_negative, generator)
    same = np.arange(num_pairs) < num_positive
    shuffled = generator.permutation(num_pairs)  # so that each part of the set, such as a fold, holds both kinds
    images = [bytes(dataset.read(image)[1]) for i in shuffled for image in chosen[i]]
    return Pairs(images, same[shuffled], dataset.name)


def pairs_from_list(list_file: str | Path, root: str | Path) -> Pairs:
    """Read the pairs that a text file lists; the image files are taken as they are.

    Lines are ``pathA pathB 0|1``, paths relative to ``root`` (separated by tabs where they contain spaces), or those
    of LFW's pairs.txt: ``name n1 n2`` for a matching pair, ``name1 n1 name2 n2`` for the others, with the images at
    ``root/name/name_0001.jpg``. Empty lines and LFW's first line, which counts, are skipped.

    Raises:
        UsageError: naming file and line: a line of another form, an image that is missing or cannot be read.
    """
    list_file, root = Path(list_file), Path(root)
    if not list_file.is_file():
        raise UsageError(f"pairs list {list_file} does not exist")
    images: list[bytes] = []
    same: list[bool] = []
    # Names may hold any bytes, and spaces that are not ASCII's.
    text = list_file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip(" \t\r")
        fields = line.split("\t") if "\t" in line else [field for field in line.split(" ") if field]
        if not line or (number == 1 and all(field.isdecimal() for field in fields)):
            continue
        where = f"{list_file}:{number}"
        path_a, path_b, flag = _parse_line(fields, root, where)
        images += [_read_image(path_a, where), _read_image(path_b, where)]
        same.append(flag)
    if not same:
        raise UsageError(
            f"pairs list {list_file} holds no pair: each line should read `pathA pathB 0` or `pathA pathB 1`"
        )
    return Pairs(images, np.array(same, dtype=np.bool_), list_file.stem)


def _matching(identities: list[np.ndarray], number: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Distinct pairs within identities: in every round each identity that has one left gives one."""
    pairs: list[tuple[int, int]] = []
    able = [members for members in identities if len(members) > 1]
    orders = [SampleOrder(len(m) * (len(m) - 1) // 2, int(generator.integers(2**63))) for m in able]
    used = 0
    while len(pairs) < number:
        for i in generator.permutation(len(able))[: number - len(pairs)].tolist():
            if used >= orders[i].num_samples:
                continue
            rank = int(orders[i].at(np.array([used]))[0])
            high = int((1 + (1 + 8 * rank) ** 0.5) / 2)  # pairs (low < high) are counted (0,1) (0,2) (1,2) (0,3) ...
            pairs.append((int(able[i][rank - high * (high - 1) // 2]), int(able[i][high])))
        used += 1
    return pairs


def _not_matching(identities: list[np.ndarray], number: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Distinct pairs across identities: each round pairs each identity with its two neighbours in a random circle."""
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < number:
        circle = generator.permutation(len(identities)).tolist()
        for a, b in zip(circle, circle[1:] + circle[:1], strict=True):
            image_a, image_b = (int(generator.choice(identities[i])) for i in (a, b))
            if len(pairs) < number:
                pairs[(min(image_a, image_b), max(image_a, image_b))] = None
    return list(pairs)


def _parse_line(fields: list[str], root: Path, where: str) -> tuple[Path, Path, bool]:
    match fields:
        case [name, first, second] if first.isdecimal() and second.isdecimal():
            return _lfw_path(root, name, first, where), _lfw_path(root, name, second, where), True
        case [name, first, other, second] if first.isdecimal() and second.isdecimal():
            return _lfw_path(root, name, first, where), _lfw_path(root, other, second, where), False
        case [path_a, path_b, ("0" | "1") as flag]:
            return root / path_a, root / path_b, flag == "1"
    raise UsageError(
        f"{where}: {' '.join(fields)!r} is no pair: expected `pathA pathB 0|1`, or LFW's `name n1 n2` or "
        "`name1 n1 name2 n2`"
    )


def _lfw_path(root: Path, name: str, number: str, where: str) -> Path:
    from ..images import SUFFIXES

    stem = root / name / f"{name}_{int(number):04d}"
    for suffix in SUFFIXES:
        if (path := stem.with_name(stem.name + suffix)).is_file():
            return path
    raise UsageError(f"{where}: there is no image {stem}.jpg (nor .png, ...): is {root} the right root?")


def _read_image(path: Path, where: str) -> bytes:
    from PIL import Image

    try:
        encoded = path.read_bytes()
        with Image.open(io.BytesIO(encoded)):
            return encoded
    except FileNotFoundError:
        raise UsageError(f"{where}: there is no image {path}") from None
    except OSError as error:
        raise UsageError(f"{where}: {path} is not an image that can be read ({error})") from error


def _image_bytes(path: Path, place: int, image: Any) -> bytes:
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = image.tobytes()
    if not isinstance(image, bytes | bytearray) or not image:
        raise UsageError(f"{path} is not a verification set: image {place} is not a string of bytes")
    return bytes(image)


def _flag(path: Path, place: int, flag: Any) -> bool:
    if not isinstance(flag, bool | int | np.bool_ | np.integer) or flag not in (0, 1):
        raise UsageError(f"{path} is not a verification set: flag {place} is neither true nor false")
    return bool(flag)
