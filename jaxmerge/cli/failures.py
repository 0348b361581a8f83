"""Errors become one clear block on stderr and an exit code."""

import os
import textwrap
from typing import Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from jaxmerge.cli import consoles

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

EXIT_CODES = """\b
Exit codes:
  0    done
  1    failed during the work (a full disk, memory, a broken installation)
  2    bad input (command line, recipe, checkpoint); nothing was written
  130  interrupted; the same command goes on with what is finished
"""


class Commands(TyperGroup):
    """The group of commands: whatever one of them raises is reported here."""

    def invoke(self, ctx: Any) -> Any:
        debug = ctx.params.get("debug") or os.environ.get("JAXMERGE_DEBUG", "") not in ("", "0")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interruption:
            if debug:
                raise
            _report(f"interrupted; {str(interruption) or 'nothing half-written remains'}")
            raise typer.Exit(INTERRUPTED) from None
        except SystemExit as ending:
            for note in getattr(ending, "__notes__", ()):
                _report(f"terminated; {note}")
            raise
        except Exception as error:
            # Exits and errors of usage have an exit code of their own. A broken pipe is a reader of
            # the output, such as `head`, that has enough: typer ends without a word.
            quiet = isinstance(error, typer.Abort | BrokenPipeError)
            if debug or quiet or hasattr(error, "exit_code"):
                raise
            code, text = explain(error)
            _report("\n".join([text, *getattr(error, "__notes__", ())]))
            raise typer.Exit(code) from None


def explain(error: Exception) -> tuple[int, str]:
    """Returns the exit code of an error and the text to show."""
    if isinstance(error, MemoryError):
        return FAILED, "out of memory"
    if isinstance(error, OSError):
        file = f"{error.filename}: " if error.filename else ""
        return FAILED, f"{file}{error.strerror or error}"
    if isinstance(error, ValueError):
        cause = error.__cause__ or error.__context__
        missing = FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError
        failed = isinstance(cause, OSError) and not isinstance(cause, missing)
        return FAILED if failed else BAD_INPUT, str(error)
    return FAILED, (
        f"{type(error).__name__}: {error}\n"
        "This should not happen. `jaxmerge --debug ...` shows where it comes from."
    )


def _report(text: str) -> None:
    first, *rest = text.splitlines() or [""]
    if rest and not rest[0].startswith(" "):
        # Problems of equal rank stand below each other.
        first, rest = "", [textwrap.indent(line, "  ") for line in (first, *rest)]
    block = Text("error:", style="bold red")
    block.append(Text("\n".join([f" {first}" if first else "", *rest]), style="not bold default"))
    consoles.err().print(block, soft_wrap=True)
