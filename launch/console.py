"""What several verbs show or ask for: a progress bar, sizes, devices."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.errors import UsageError

if TYPE_CHECKING:
    import torch


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (done, total) that moves a bar on stderr; no bar where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, whole: bool = False) -> None:
    """A plain table, the first column to the left, the others to the right; as wide as need be where it must be
    ``whole``, and without a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal and not whole else Console(width=10_000)).print(table, soft_wrap=whole)


def complete_run(incomplete: str) -> list[str]:
    """Runs in runs/ and in the folder that is being typed, for the shell's completion."""
    folder = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    return sorted({str(file.parent) for here in (Path("runs"), folder) for file in here.glob("*/config.yaml")})


def check_outputs(*files: Path | None, picture: Path | None = None) -> None:
    """Before anything is measured: a wrong name should not cost the figures."""
    if picture is not None and picture.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--plot {picture}: must end in .png, .pdf or .svg")
    for file in (*files, picture):
        if file is not None and not file.absolute().parent.is_dir():
            raise UsageError(f"{file}: no folder {file.absolute().parent} to write it to")


def parse_size(text: str) -> tuple[int, int] | None:
    """``112`` or ``112x96`` (height x width) in pixels; None for ``keep``."""
    if text == "keep":
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UsageError(f"--size {text}: write pixels as 112, or height and width as 112x96")
    return int(sides[0]), int(sides[-1])


def find_device(name: str) -> "torch.device":
    """The device that ``--device`` names; ``auto`` (the CPU without a GPU) and ``cuda`` are each rank's own."""
    import torch

    from ..engine.device import local_device

    if name == "auto":
        return local_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: write auto, cpu, cuda or cuda:N") from None
    if device.type != "cpu" and (device.index or 0) >= (count := torch.accelerator.device_count()):
        raise UsageError(f"--device {name}: PyTorch finds {count} GPUs here (see pfc doctor)")
    return local_device() if device.type != "cpu" and device.index is None else device


def warn(line: str) -> None:
    """One line on stderr about something that the person should know."""
    print(f"pfc: {line}", file=sys.stderr)
