"""``pfc doctor``: what this machine has, and what to do about what it lacks."""

from typing import Annotated

import typer


def doctor(json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> int:
    """Look at this machine: versions, devices, and whether decoding, kernels and communication really work.

    Exits with 1 where something is missing without which nothing can be trained.
    """
    from ..doctor import as_json, examine, is_fit

    if json:
        from json import dumps

        checks = examine()
        print(dumps(as_json(checks), indent=2))
        return 0 if is_fit(checks) else 1

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    with console.status("trying things out ..."):
        checks = examine()
    colors = {"ok": "green", "warning": "yellow", "missing": "red"}
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for column in ("status", "name", "found"):
        table.add_column(column, no_wrap=column != "found", overflow="fold")
    for check in checks:
        found = escape(check.found) + (f"\n[dim]→ {escape(check.advice)}[/dim]" if check.advice else "")
        table.add_row(f"[{colors[check.status]}]{check.status}[/]", check.name, found)
    console.print(table)
    return 0 if is_fit(checks) else 1
