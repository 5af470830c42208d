"""Printed characters as a real data set of many classes that any machine can make.

A character is an identity; the character in one font, slightly turned, sheared, scaled, shifted, blurred and lit, is
a photograph of it. The held-out part has characters that are never trained on, drawn in fonts that are never trained
on: an honest open-set test.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..packing.writer import ShardedWriter, check_output
from ..pairs.pairs import make_pairs, write_pairs
from ..protocols.made import records
from ..records.dataset import RecordDataset
from ..workers import Progress, end_unguarded_worker, parallel_map
from .drawing import Photograph, draw_glyph
from .fonts import HAN, Font, find_fonts, split_fonts

_FONTS_PER_CHARACTER = 3  # a character that fewer training fonts draw shows too little variety to be learned from
_DISTRACTORS = 4000
_TRAINING, _HELDOUT, _SPOILT = 0, 1, 2  # keep the random numbers of the two parts, and of what is spoilt, apart


@dataclass(frozen=True)
class GlyphSummary:
    """What ``pack_glyphs`` wrote. The held-out part shares neither characters nor fonts with the training part."""

    out: Path
    identities: int
    images: int
    heldout_identities: int
    heldout_images: int
    heldout_pairs: int
    training_fonts: tuple[str, ...]
    heldout_fonts: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.out / 'train'}: {self.images:,} images of {self.identities:,} characters in "
            f"{', '.join(self.training_fonts)}\n"
            f"{self.out / 'heldout'}: {self.heldout_images:,} images of {self.heldout_identities:,} other characters "
            f"in {', '.join(self.heldout_fonts)}\n"
            f"{self.out / 'heldout.bin'}: {self.heldout_pairs:,} pairs of them\n"
            f"{self.out / 'identify.csv'}: half of them to be found among images of the {self.identities:,} characters"
        )


def pack_glyphs(
    out: str | Path,
    *,
    identities: int = 2000,
    images_per_identity: int = 20,
    size: int = 40,
    heldout_identities: int = 300,
    heldout_pairs: int = 3000,
    seed: int = 0,
    workers: int | None = None,
    fonts: Sequence[str | Path] | None = None,
    heldout_fonts: Iterable[str] | None = None,
    shards: int = 1,
    quality: int = 92,
    blurred: float = 0.0,
    tiny: float = 0.0,
    mislabelled: float = 0.0,
    progress: Progress | None = None,
) -> GlyphSummary:
    """Draw characters and pack them: OUT/train and OUT/heldout (packed sets), and what they are judged by.

    OUT/heldout.bin: pairs of the held-out characters. OUT/identify.csv: one image of half of them is a gallery,
    together with images of the training characters; all others are searched for.

    The same arguments and fonts give the same files, whatever the number of workers.

    Args:
        out: a directory that does not exist yet or is empty.
        identities: characters to train on: Han characters, then Hangul syllables where these do not suffice.
        images_per_identity: images of every character, in the training and in the held-out part.
        size: height and width of an image in pixels, at least 16.
        heldout_identities, heldout_pairs: size of the held-out part; half of the pairs match.
        workers: processes that draw; None: one a core.
        fonts: font files or directories; by default those of the `demo` extra and the machine's own.
        heldout_fonts: parts of the names of the fonts to hold out; see ``split_fonts`` for the default.
        blurred, tiny, mislabelled: shares of the training images that are out of focus, of few pixels, or another
            character than their label says; the first two exclude each other.
        shards, quality: number of ``.rec`` files of the training part; JPEG quality, 1 to 100.
        progress: called as progress(done, total) over the images of both parts.

    Raises:
        UsageError: OUT is not empty; too few fonts; more identities than the fonts can draw.
    """
    end_unguarded_worker()
    out = Path(out)
    check_output(out, overwrite=None)
    for what, value, least in (
        ("identities", identities, 1),
        ("images_per_identity", images_per_identity, 2),
        ("size", size, 16),
        ("heldout_identities", heldout_identities, 2),
        ("heldout_pairs", heldout_pairs, 2),
    ):
        if value < least:
            raise UsageError(f"{what} is {value}: glyphs need at least {least}")
    for what, share in (("blurred", blurred), ("tiny", tiny), ("mislabelled", mislabelled), ("both", blurred + tiny)):
        if not 0 <= share <= 1:
            told = "blurred and tiny together" if what == "both" else what
            raise UsageError(f"{told} is {share:g}: a share of the images lies between 0 and 1")
    if mislabelled and identities < 2:
        raise UsageError("mislabelled images need two identities or more")
    training_fonts, held_fonts = split_fonts(find_fonts(fonts), heldout_fonts)
    characters, held_characters = choose_characters(
        training_fonts, held_fonts, identities=identities, heldout_identities=heldout_identities, seed=seed
    )
    shares = {"blurred": blurred, "tiny": tiny, "mislabelled": mislabelled}
    total = (len(characters) + len(held_characters)) * images_per_identity
    done = 0

    def pack(name: str, part: int, chars: list[str], fonts: list[Font], shards: int) -> None:
        nonlocal done
        draw = partial(draw_glyph, size=size, quality=quality)
        tasks = _photographs(chars, fonts, images_per_identity, (seed, part))
        creation = {"fonts": [font.name for font in fonts], "images_per_identity": images_per_identity, "seed": seed}
        if part == _TRAINING and (spoilt := {name: share for name, share in shares.items() if share}):
            tasks = _spoil(tasks, len(chars), shares, seed)
            creation |= spoilt
        with ShardedWriter(
            unfinished / name,
            identities=chars,
            image_size=(size, size),
            source="glyphs",
            name=f"{out.resolve().name}-{name}",
            creation=creation,
            shards=shards,
        ) as writer:
            for label, image in parallel_map(draw, tasks, workers=workers):
                writer.write(label, image)
                done += 1
                if progress and (done % 256 == 0 or done == total):
                    progress(done, total)

    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        # The small part first: where it is impossible to make, nobody should have waited for the large one.
        pack("heldout", _HELDOUT, held_characters, held_fonts, 1)
        pairs = make_pairs(RecordDataset.open(unfinished / "heldout"), heldout_pairs, seed)
        write_pairs(unfinished / "heldout.bin", pairs)
        pack("train", _TRAINING, characters, training_fonts, shards)
        records(
            unfinished / "heldout",
            unfinished / "identify.csv",
            distractors=[unfinished / "train"],
            most_distractors=_DISTRACTORS,
            seed=seed,
        )
        unfinished.chmod(0o755)  # mkdtemp's own is for its owner alone
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return GlyphSummary(
        out=out,
        identities=len(characters),
        images=len(characters) * images_per_identity,
        heldout_identities=len(held_characters),
        heldout_images=len(held_characters) * images_per_identity,
        heldout_pairs=len(pairs.same),
        training_fonts=tuple(font.name for font in training_fonts),
        heldout_fonts=tuple(font.name for font in held_fonts),
    )


def choose_characters(
    training_fonts: Sequence[Font],
    heldout_fonts: Sequence[Font],
    *,
    identities: int,
    heldout_identities: int,
    seed: int,
) -> tuple[list[str], list[str]]:
    """Characters to train on and characters held out: disjoint, and a function of the arguments alone.

    Held-out characters are Han characters that every held-out font draws. Training characters are, as far as they
    last, Han characters that every training font draws, then those that fewer draw, then Hangul.

    Raises:
        UsageError: the fonts do not draw as many characters as are asked for.
    """
    generator = np.random.default_rng(seed)
    shared = sorted(
        code for code in frozenset.intersection(*(font.characters for font in heldout_fonts)) if code in HAN
    )
    if heldout_identities > len(shared):
        raise UsageError(
            f"{heldout_identities} held-out identities asked for, but the held-out fonts share {len(shared)} Han "
            "characters: ask for fewer or hold out other fonts"
        )
    heldout = {int(code) for code in generator.permutation(shared)[:heldout_identities]}
    coverage: dict[int, int] = {}
    for font in training_fonts:
        for code in font.characters:
            coverage[code] = coverage.get(code, 0) + 1
    enough = min(_FONTS_PER_CHARACTER, len(training_fonts))
    drawable = sorted(code for code, count in coverage.items() if count >= enough and code not in heldout)
    if identities > len(drawable):
        raise UsageError(
            f"{identities} identities asked for, but these {len(training_fonts)} training fonts give {len(drawable)}: "
            "ask for fewer or add fonts (`pip install 'pfc[demo]'` brings Noto Sans CJK, with 31,000 characters)"
        )
    ties = generator.random(len(drawable))
    best_first = sorted(range(len(drawable)), key=lambda i: (drawable[i] not in HAN, -coverage[drawable[i]], ties[i]))
    return [chr(drawable[i]) for i in best_first[:identities]], [chr(code) for code in sorted(heldout)]


def _photographs(
    characters: Sequence[str], fonts: Sequence[Font], images_per_identity: int, key: tuple[int, int]
) -> Iterator[Photograph]:
    """What to draw, in random order: each character in the fonts that have it by turns, starting with any of them."""
    generator = np.random.default_rng(key)
    able = [[font for font in fonts if ord(character) in font.characters] for character in characters]
    first = generator.integers(0, len(fonts), len(characters))
    for number in map(int, generator.permutation(len(characters) * images_per_identity)):
        label, image = divmod(number, images_per_identity)
        font = able[label][(first[label] + image) % len(able[label])]
        yield Photograph(label, characters[label], str(font.path), (*key, label, image))


def _spoil(tasks: Iterable[Photograph], identities: int, shares: dict[str, float], seed: int) -> Iterator[Photograph]:
    """The same with a share of worse pictures and of other labels; a function of the seed."""
    generator = np.random.default_rng((seed, _SPOILT))
    for task in tasks:
        kind, other, shift = generator.random(), generator.random(), int(generator.integers(1, max(2, identities)))
        if other < shares["mislabelled"]:
            task = task._replace(label=(task.label + shift) % identities)
        if kind < shares["blurred"]:
            task = task._replace(spoilt="blurred")
        elif kind < shares["blurred"] + shares["tiny"]:
            task = task._replace(spoilt="tiny")
        yield task
