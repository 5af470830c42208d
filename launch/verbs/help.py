"""``pfc help``: the pages of the documentation, in the terminal."""

import difflib
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from ...data.errors import UsageError

_HERE = Path(__file__).parents[2]  # the folder pfc where it is installed, else the checkout: they have the same pages


def help_topic(
    topic: Annotated[
        str | None, typer.Argument(metavar="[TOPIC]", help="A page, or a verb.", autocompletion=lambda: list(topics()))
    ] = None,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[WORD]...", help="Show only the page's sections on this.")
    ] = None,
) -> int:
    """Read the documentation here: pfc help lists its pages, pfc help data shows one, pfc help data labels a part.

    On a terminal through a pager ($PAGER), otherwise as plain text. pfc help VERB is pfc VERB --help.
    """
    pages = topics()
    if topic is None:
        for name, page in pages.items():
            line = f"{name:<{max(map(len, pages))}}  {_about(page.read_text(encoding='utf-8'))}"
            width = shutil.get_terminal_size().columns
            print(line if not sys.stdout.isatty() or len(line) <= width else f"{line[: width - 1]}…")
        return 0
    if topic not in pages:
        from ..cli import main, verbs

        if topic in verbs():
            return main([topic, *(words or []), "--help"])
        raise UsageError(f"no topic {topic!r}; {_instead(topic, [*pages, *verbs()])}")
    text = pages[topic].read_text(encoding="utf-8")
    _show(_find(topic, text, " ".join(words)) if words else text)
    return 0


def topics() -> dict[str, Path]:
    """Name → page, by name."""
    pages = {page.stem: page for page in (_HERE / "docs").glob("*.md")}
    return dict(sorted((pages | {"machines": _HERE / "launch" / "README.md"}).items()))


def _instead(word: str, known: list[str]) -> str:
    near = [name for name in known if name.startswith(word)] or difflib.get_close_matches(word, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"


def _about(page: str) -> str:
    """Its first sentence."""
    paragraphs = (block for block in page.split("\n\n") if re.match(r"[^\W\d_]|`(?!``)", block))
    text = re.sub(r"\[(.+?)\]\(.+?\)", r"\1", " ".join(next(paragraphs, "").split()))
    return re.split(r"(?<=[.?]) ", text)[0].rstrip(":.")


def _find(topic: str, page: str, wanted: str) -> str:
    """The sections whose headings contain the words; else the smallest sections that do."""
    lines = page.splitlines()
    fence, headings = False, []
    for place, line in enumerate(lines):
        fence ^= line.startswith("```")
        if not fence and (match := re.match(r"(#+) +(.+)", line)):
            headings.append((place, len(match[1]), match[2]))
    found = []
    for number, (start, level, title) in enumerate(headings):
        later = (place for place, other, _ in headings[number + 1 :] if other <= level)
        if _plain(wanted) in _plain(title) and (not found or start >= found[-1][1]):
            found.append((start, next(later, len(lines))))
    if not found:
        starts = [place for place, _, _ in headings]
        pieces = zip(starts, [*starts[1:], len(lines)], strict=True)
        found = [piece for piece in pieces if _plain(wanted) in _plain(" ".join(lines[slice(*piece)]))]
    if not found:
        titles = [title for _, _, title in headings]
        raise UsageError(f"pfc help {topic} has nothing on {wanted!r}; {_instead(wanted, titles)}")
    return "\n\n".join("\n".join(lines[slice(*piece)]).strip() for piece in found) + "\n"


def _plain(text: str) -> str:
    """Letters and digits alone: SphereFace2, `sphereface2` and Sphere-Face 2 are the same."""
    return "".join(filter(str.isalnum, text.lower()))


def _show(text: str) -> None:
    """As it is where it is not a terminal that shows it."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    os.environ.setdefault("LESS", "FRX")  # of one screen, no pager; with colours
    console = Console()
    with console.pager(styles=True):
        console.print(Markdown(text))
