"""The commands under one name. Nothing heavy is imported until a command runs."""

from typing import Annotated

import typer

from jaxmerge.cli import (
    align,
    convert,
    doctor,
    extract_lora,
    inspect,
    merge,
    methods,
    plan,
    quickstart,
    reproduce,
    search,
    sweep,
)
from jaxmerge.cli.consoles import say
from jaxmerge.cli.failures import EXIT_CODES, Commands

app = typer.Typer(
    cls=Commands,
    help="Merge neural networks.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from jaxmerge._version import __version__

        say(f"jaxmerge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show tracebacks, as JAXMERGE_DEBUG=1 does."),
    ] = False,
) -> None:
    pass


for _command in (
    merge.merge,
    plan.plan,
    reproduce.reproduce,
    methods.methods,
    sweep.sweep,
    search.search,
    convert.convert,
    extract_lora.extract_lora,
    align.align,
    inspect.inspect,
    doctor.doctor,
    quickstart.quickstart,
):
    app.command(epilog=EXIT_CODES)(_command)
