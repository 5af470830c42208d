"""``pfc new``: files to begin with."""

import difflib
from pathlib import Path
from typing import Annotated

import typer

from ...configs import about, recipes
from ...data.errors import UsageError
from ..models import check_new_file, write_whole

app = typer.Typer(help="Write files to begin with.", no_args_is_help=True)


@app.callback()
def _new() -> None:
    """Write files to begin with."""


@app.command()
def recipe(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A recipe; without one all are listed.",
            show_default=False,
            autocompletion=lambda: list(recipes()),
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT.yaml]", help="File to write. [dim]\\[default: NAME.yaml, here][/dim]", show_default=False
        ),
    ] = None,
) -> int:
    """Copy a commented configuration for a usual task, to be edited.

    MS1MV3, Glint360K, WebFace42M, 10 and 90 million identities, products, people, fine-tuning: docs/recipes.md.
    """
    known = recipes()
    if name is None:
        width = max(map(len, known))
        for one, path in known.items():
            print(f"{one:<{width}}  {about(path)}")
        return 0
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? Known: " if near else "known: "
        raise UsageError(f"no recipe {name!r}; {hint}{', '.join(known)}")
    out = out or Path(f"{name}.yaml")
    check_new_file(out, ".yaml", ".yml")
    content = known[name].read_bytes()

    def write(partial: Path) -> None:
        partial.write_bytes(content)

    write_whole(out, write)
    print(f"wrote {out}: edit its paths, then `pfc plan {out}` and `pfc train {out}`")
    return 0
