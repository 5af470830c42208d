"""Printed characters, or emoji, as a real data set of many classes that any machine can make.

A character is an identity; the character in one font, slightly turned, sheared, scaled, shifted, blurred and lit, is
a photograph of it. The held-out part has characters that are never trained on, drawn in fonts that are never trained
on: an honest open-set test.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..packing.writer import ShardedWriter, check_output
from ..pairs.pairs import make_pairs, write_pairs
from ..protocols.made import records
from ..records.dataset import RecordDataset
from ..workers import Progress, end_unguarded_worker, parallel_map
from .drawing import Photograph, draw_glyph
from .fonts import HANGUL, Font, find_fonts, split_fonts

_FONTS_PER_CHARACTER = 3  # a character that fewer training fonts draw shows too little variety to be learned from
_DISTRACTORS = 4000
_TRAINING, _HELDOUT, _SPOILT, _TAIL, _SPLIT, _DOMAIN = range(6)  # keep the random numbers of each purpose apart
_DOMAIN_NAME = re.compile(r"[a-z][a-z0-9_]*")
_OWN_NAMES = ("train", "heldout", "identify")


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
    domain_fonts: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = (
            f"{self.out / 'train'}: {self.images:,} images of {self.identities:,} characters in "
            f"{', '.join(self.training_fonts)}\n"
            f"{self.out / 'heldout'}: {self.heldout_images:,} images of {self.heldout_identities:,} other characters "
            f"in {', '.join(self.heldout_fonts)}\n"
            f"{self.out / 'heldout.bin'}: {self.heldout_pairs:,} pairs of them\n"
            f"{self.out / 'identify.csv'}: half of them to be found among images of the {self.identities:,} characters"
        )
        for name, fonts in self.domain_fonts.items():
            lines += f"\n{self.out / name}: the same characters in {', '.join(fonts)}; {name}.bin and {name}.csv"
        return lines


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
    fewest_images: int | None = None,
    split: float = 0.0,
    domains: Mapping[str, Sequence[str | Path]] | None = None,
    progress: Progress | None = None,
) -> GlyphSummary:
    """Draw characters and pack them: OUT/train and OUT/heldout (packed sets), and what they are judged by.

    OUT/heldout.bin: pairs of the held-out characters. OUT/identify.csv: one image of half of them is a gallery,
    together with images of the training characters; all others are searched for. The same for each of ``domains``:
    OUT/NAME, OUT/NAME.bin and OUT/NAME.csv.

    The same arguments and fonts give the same files, whatever the number of workers.

    Args:
        out: a directory that does not exist yet or is empty.
        identities: characters to train on: Han characters, then Hangul syllables where these do not suffice.
        images_per_identity: images of every character, in the training and in the held-out part.
        fewest_images: a long tail: the training images of a character fall geometrically from ``images_per_identity``
            to this; which characters are frequent is drawn. None: all have the same.
        split: share of the training characters that are two identities, each with every other image.
        size: height and width of an image in pixels, at least 16.
        heldout_identities, heldout_pairs: size of the held-out part; half of the pairs match.
        workers: processes that draw; None: one a core.
        fonts: font files or directories; by default those of the `demo` extra and the machine's own.
        heldout_fonts: parts of the names of the fonts to hold out; see ``split_fonts`` for the default.
        domains: name → font files or directories of another kind, such as handwriting, in which the held-out
            characters are drawn too.
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
    if fewest_images is not None and not 1 <= fewest_images <= images_per_identity:
        raise UsageError(f"fewest_images is {fewest_images}: it takes 1 to {images_per_identity}, images_per_identity")
    for what, share in (
        ("blurred", blurred),
        ("tiny", tiny),
        ("mislabelled", mislabelled),
        ("split", split),
        ("both", blurred + tiny),
    ):
        if not 0 <= share <= 1:
            told = "blurred and tiny together" if what == "both" else what
            raise UsageError(f"{told} is {share:g}: a share of the images lies between 0 and 1")
    if mislabelled and identities < 2:
        raise UsageError("mislabelled images need two identities or more")
    for name in domains or {}:
        if not _DOMAIN_NAME.fullmatch(name) or name in _OWN_NAMES:
            raise UsageError(f"domain {name!r}: a name of small letters, digits and _, none of {', '.join(_OWN_NAMES)}")
    training_fonts, held_fonts = split_fonts(find_fonts(fonts), heldout_fonts)
    domain_fonts = {name: find_fonts(paths) for name, paths in (domains or {}).items()}
    for name, found in domain_fonts.items():
        if not found:
            raise UsageError(f"domain {name}: no font in what was named: name font files, or a folder that has some")
        if trained := {font.name for font in found} & {font.name for font in training_fonts}:
            raise UsageError(f"domain {name}: {min(trained)} is trained on: name fonts that are not")
    characters, held_characters = choose_characters(
        training_fonts,
        [*held_fonts, *(font for fonts in domain_fonts.values() for font in fonts)],
        identities=identities,
        heldout_identities=heldout_identities,
        seed=seed,
    )
    counts = _counts(len(characters), images_per_identity, fewest_images or images_per_identity, seed)
    second = _split(counts, split, seed)
    shares = {"blurred": blurred, "tiny": tiny, "mislabelled": mislabelled}
    held_images = len(held_characters) * images_per_identity
    total, done = int(counts.sum()) + held_images * (1 + len(domain_fonts)), 0

    def pack(
        name: str, tasks: Iterable[Photograph], names: list[str], fonts: list[Font], shards: int, **more: Any
    ) -> None:
        nonlocal done
        draw = partial(draw_glyph, size=size, quality=quality)
        creation = {"fonts": [font.name for font in fonts], "images_per_identity": images_per_identity, "seed": seed}
        with ShardedWriter(
            unfinished / name,
            identities=names,
            image_size=(size, size),
            source="glyphs",
            name=f"{out.resolve().name}-{name}",
            creation=creation | more,
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
        # The small parts first: where they are impossible to make, nobody should have waited for the large one.
        for number, (name, fonts_of_it) in enumerate([("heldout", held_fonts), *domain_fonts.items()]):
            key = (seed, _HELDOUT) if number == 0 else (seed, _DOMAIN, number)
            every = np.full(len(held_characters), images_per_identity)
            pack(name, _photographs(held_characters, fonts_of_it, every, key), held_characters, fonts_of_it, 1)
            write_pairs(
                unfinished / f"{name}.bin", make_pairs(RecordDataset.open(unfinished / name), heldout_pairs, seed)
            )
        tasks = _photographs(characters, training_fonts, counts, (seed, _TRAINING), second)
        names = characters + [f"{characters[place]}, again" for place in np.flatnonzero(second >= 0)]
        spoilt = {name: share for name, share in shares.items() if share}
        if spoilt:
            tasks = _spoil(tasks, len(names), shares, seed)
        if fewest_images is not None:
            spoilt["fewest_images"] = fewest_images
        if split:
            spoilt["split"] = split
        pack("train", tasks, names, training_fonts, shards, **spoilt)
        for name in ("heldout", *domain_fonts):
            records(
                unfinished / name,
                unfinished / f"{'identify' if name == 'heldout' else name}.csv",
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
        identities=len(names),
        images=int(counts.sum()),
        heldout_identities=len(held_characters),
        heldout_images=held_images,
        heldout_pairs=heldout_pairs,
        training_fonts=tuple(font.name for font in training_fonts),
        heldout_fonts=tuple(font.name for font in held_fonts),
        domain_fonts={name: tuple(font.name for font in fonts) for name, fonts in domain_fonts.items()},
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

    Held-out characters are Han characters (or pictures) that every held-out font draws. Training characters are, as far
    as they last, those that every training font draws, then those that fewer draw, then Hangul.

    Raises:
        UsageError: the fonts do not draw as many characters as are asked for.
    """
    generator = np.random.default_rng(seed)
    shared = sorted(one for one in frozenset.intersection(*(f.characters for f in heldout_fonts)) if not _hangul(one))
    if heldout_identities > len(shared):
        raise UsageError(
            f"{heldout_identities} held-out identities asked for, but the held-out fonts share {len(shared)} Han "
            "characters: ask for fewer or hold out other fonts"
        )
    heldout = {shared[place] for place in generator.permutation(len(shared))[:heldout_identities]}
    coverage: dict[str, int] = {}
    for font in training_fonts:
        for character in font.characters:
            coverage[character] = coverage.get(character, 0) + 1
    enough = min(_FONTS_PER_CHARACTER, len(training_fonts))
    drawable = sorted(one for one, count in coverage.items() if count >= enough and one not in heldout)
    if identities > len(drawable):
        raise UsageError(
            f"{identities} identities asked for, but these {len(training_fonts)} training fonts give {len(drawable)}: "
            "ask for fewer or add fonts (`pip install 'pfc[demo]'` brings Noto Sans CJK, with 31,000 characters)"
        )
    ties = generator.random(len(drawable))
    best_first = sorted(range(len(drawable)), key=lambda i: (_hangul(drawable[i]), -coverage[drawable[i]], ties[i]))
    return [drawable[i] for i in best_first[:identities]], sorted(heldout)


def _hangul(character: str) -> bool:
    return len(character) == 1 and ord(character) in HANGUL


def _counts(identities: int, most: int, fewest: int, seed: int) -> NDArray[np.int64]:
    """Training images of each character, [C]: from ``most`` down to ``fewest``, each by the same factor less."""
    falling = np.rint(np.geomspace(most, fewest, identities)).astype(np.int64)
    return falling if most == fewest else np.random.default_rng((seed, _TAIL)).permutation(falling)


def _split(counts: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """The second label of each character that is two identities, −1 of the others, [C]; one image cannot be two."""
    able = np.flatnonzero(counts > 1)
    chosen = np.random.default_rng((seed, _SPLIT)).permutation(able)[: round(share * len(able))]
    second = np.full(len(counts), -1)
    second[np.sort(chosen)] = len(counts) + np.arange(len(chosen))
    return second


def _photographs(
    characters: Sequence[str],
    fonts: Sequence[Font],
    counts: NDArray[np.int64],
    key: tuple[int, ...],
    second: NDArray[np.int64] | None = None,
) -> Iterator[Photograph]:
    """What to draw, in random order: each character in the fonts that have it by turns, starting with any of them.

    Args:
        counts: images of each.
        second: label of every other image of each; negative where that is its own, as it is without.
    """
    generator = np.random.default_rng(key)
    able = [[font for font in fonts if character in font.characters] for character in characters]
    first = generator.integers(0, len(fonts), len(characters))
    ends = np.cumsum(counts)
    for number in generator.permutation(int(ends[-1])):
        place = int(np.searchsorted(ends, number, side="right"))
        image = int(number - (ends[place] - counts[place]))
        font = able[place][(first[place] + image) % len(able[place])]
        label = place if second is None or second[place] < 0 or image % 2 == 0 else int(second[place])
        yield Photograph(label, characters[place], str(font.file_of(characters[place])), (*key, place, image))


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
