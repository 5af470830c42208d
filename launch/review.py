"""What ``pfc overlap`` and ``pfc clean`` share: names, lists and pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .models import Images

if TYPE_CHECKING:
    from ..data import RecordDataset
    from ..engine.report.pictures import PairPicture


class PairImages:
    """The images of a verification set, each an identity of its own: its label is its number."""

    def __init__(self, images: Sequence[bytes]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[int, bytes]:
        """As of ``RecordDataset``."""
        return index, self.images[index]


class Names:
    """The names of a set's identities; their numbers where it saved none."""

    def __init__(self, dataset: "RecordDataset | PairImages") -> None:
        self.saved = (None if isinstance(dataset, PairImages) else dataset.identity_names()) or []

    def __getitem__(self, label: int) -> str:
        return self.saved[label] if label < len(self.saved) else str(label)

    def shared(self, other: "Names") -> list[tuple[int, int]]:
        """Labels, here and there, of the same saved name."""
        there = {name: label for label, name in enumerate(other.saved) if name}
        return [(label, there[name]) for label, name in enumerate(self.saved) if name in there]


def write_lines(path: Path, lines: Iterable[object]) -> None:
    """One a line, as ``pfc pack`` reads its lists."""
    content = "".join(f"{line}\n" for line in lines)
    path.write_text(content, encoding="utf-8", errors="surrogateescape", newline="")


def side_by_side(told: str, *images: tuple[Images, int]) -> "PairPicture":
    """Images, each by its set and its number there, with a line below."""
    from ..engine.report.pictures import PairPicture, picture_uri

    return PairPicture(tuple(picture_uri(bytes(dataset.read(number)[1])) for dataset, number in images), told)
