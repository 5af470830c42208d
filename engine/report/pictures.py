"""The report's pictures: which pairs to show, and the pictures themselves."""

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...data.errors import UsageError
from .record import Scores

if TYPE_CHECKING:
    from ...data.pairs.pairs import Pairs
    from ..evaluation.judgement import Judgement

LONGEST_SIDE = 112  # pixels of a picture in the report


@dataclass(frozen=True)
class PairPicture:
    images: tuple[str, ...]
    """Data URIs: of a pair; or of a probe, of what it was taken for, and of its own identity."""
    told: str
    right: bool | None = None
    """None where there is nothing to be right about."""


@dataclass(frozen=True)
class PairGroup:
    title: str
    pairs: list[PairPicture]


def picture_groups(pairs: "Pairs", scores: Scores, threshold: float, count: int = 6) -> list[PairGroup]:
    """The pairs worth looking at: the hardest of either kind, and typical ones (closest to their kind's median)."""
    groups = (
        ("Different identities, most alike to the network", _extremes(scores, same=False)),
        ("Same identity, least alike to the network", _extremes(scores, same=True)),
        ("Same identity, typical", _typical(scores, threshold, same=True)),
        ("Different identities, typical", _typical(scores, threshold, same=False)),
    )
    return [
        PairGroup(title, [_picture(pairs.images, scores, int(place), threshold) for place in places[:count]])
        for title, places in groups
        if len(places)
    ]


def _extremes(scores: Scores, *, same: bool) -> NDArray[np.intp]:
    """Pairs of one kind, the hardest first."""
    places = np.flatnonzero(scores.same == same)
    return places[np.argsort(scores.cosine[places] if same else -scores.cosine[places], kind="stable")]


def _typical(scores: Scores, threshold: float, *, same: bool) -> NDArray[np.intp]:
    """Pairs of one kind that are decided rightly, the one closest to their median first."""
    places = np.flatnonzero((scores.same == same) & ((scores.cosine >= threshold) == same))
    cosines = scores.cosine[places]
    return places if not len(places) else places[np.argsort(np.abs(cosines - np.median(cosines)), kind="stable")]


def _picture(images: Sequence[bytes], scores: Scores, place: int, threshold: float) -> PairPicture:
    cosine = float(scores.cosine[place])
    right = (cosine >= threshold) == bool(scores.same[place])
    both = picture_uri(images[2 * place]), picture_uri(images[2 * place + 1])
    return PairPicture(both, f"cosine {cosine:.3f}", right)


def worst_probes(judgement: "Judgement", images: Sequence[bytes | np.ndarray], count: int = 12) -> list[PairGroup]:
    """The probes that another identity beats by most: each, what it was taken for, and its own best image."""
    pictures = []
    for probe, taken, mate, other, own in judgement.worst[:count]:
        with suppress(OSError, ValueError, UsageError):  # what was judged may be embeddings, whose images are broken
            shown = tuple(picture_uri(bytes(images[row])) for row in (probe, taken, mate))
            pictures.append(PairPicture(shown, f"{other:.3f}, its own {own:.3f}", own > other))
    title = (
        "Probes that were least rightly found: each, the other identity nearest to it, and its own identity's nearest"
    )
    return [PairGroup(title, pictures)] if pictures else []


def picture_uri(encoded: bytes) -> str:
    """An encoded image of any format that Pillow reads → data URI of a JPEG, which every browser shows."""
    from PIL import Image  # only the report needs it here

    picture = Image.open(io.BytesIO(encoded)).convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
