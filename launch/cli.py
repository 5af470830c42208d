"""The command line, ``pfc``: its verbs, and what their endings look like.

Exit codes: 0 done, 2 wrong use (one clear line), 130 after Ctrl-C, 1 anything else. The verbs are functions of
``verbs/``; each imports what it needs when it is called, so that ``pfc --help`` is quick.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..data.errors import UsageError, forbidden
from .verbs import (
    bench,
    centers,
    clean,
    compare,
    convert,
    doctor,
    embed,
    evaluate,
    export,
    help,
    inspect,
    new,
    overlap,
    pack,
    plan,
    sweep,
    threshold,
    train,
    watch,
)


class _Verbs(TyperGroup):
    """Its own help is plain text, that of a verb is rich's, whose import takes as long as all the rest together."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.get_short_help_str(limit=200)) for name, verb in self.commands.items()])
        with formatter.section("Options"):
            formatter.write_dl([record for option in self.get_params(ctx) if (record := option.get_help_record(ctx))])


app = typer.Typer(
    name="pfc",
    cls=_Verbs,
    help="Trains embedding networks over millions of identities: class centers cut over all ranks, classes sampled.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command()(train.train)
app.add_typer(new.app, name="new")
app.command()(plan.plan)
app.add_typer(pack.app, name="pack")
app.command()(watch.watch)
app.command()(compare.compare)
app.command()(sweep.sweep)
app.command()(inspect.inspect)
app.command()(evaluate.evaluate)
app.command()(threshold.threshold)
app.command()(embed.embed)
app.command()(centers.centers)
app.command()(overlap.overlap)
app.command()(clean.clean)
app.command()(export.export)
app.command()(convert.convert)
app.add_typer(bench.app, name="bench")
app.command()(doctor.doctor)
app.command("help")(help.help_topic)


def verbs() -> list[str]:
    """Their names."""
    return list(typer.main.get_group(app).commands)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (the process's own by default); returns the exit code."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        return app(arguments, prog_name="pfc", standalone_mode=False) or 0
    except UsageError as error:
        print(f"pfc: {error}", file=sys.stderr)
    except PermissionError as error:
        if not isinstance(told := forbidden(error), UsageError):
            raise
        print(f"pfc: {told}", file=sys.stderr)
    except typer.TyperException as error:  # an unknown option, a missing argument, a value of the wrong type
        command = context.command_path if (context := getattr(error, "ctx", None)) else "pfc"
        what = " ".join(error.format_message().split())  # a list of choices has a line for each
        if what:  # there is nothing to say after the help of a verb that was given alone and has verbs of its own
            print(f"pfc: {what}\nTry '{command} --help'.", file=sys.stderr)
    return 2


def _print_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        print(f"pfc {importlib.metadata.version('pfc')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of ``pfc`` itself."""


if __name__ == "__main__":
    sys.exit(main())
