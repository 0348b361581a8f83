"""Where text goes: results to stdout, everything else to stderr; colour on terminals only."""

import sys
from collections.abc import Iterable, Sequence
from typing import IO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Wide enough that no line of a file or a pipe is ever folded.
_UNFOLDED = 10_000


def out() -> Console:
    """The console of results."""
    return _console(sys.stdout)


def err() -> Console:
    """The console of notes, progress and errors."""
    return _console(sys.stderr)


def say(text: str) -> None:
    """Writes a line of the result."""
    out().print(text, soft_wrap=True)


def note(text: str) -> None:
    """Writes a remark beside the result."""
    label = Text("note: ", style="yellow")
    err().print(label.append(Text(text, style="not bold default")), soft_wrap=True)


def notes(texts: Iterable[str]) -> None:
    """Writes remarks beside the result."""
    for text in texts:
        note(text)


def show(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    right: Sequence[str] = (),
) -> None:
    """Writes a table to the result.

    Args:
        columns: the headings.
        rows: a cell per column.
        title: a line above.
        right: headings of the columns that are flush right.
    """
    if title:
        say(title)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*[Text(str(cell)) for cell in row])
    console = out()
    with console.capture() as captured:
        console.print(table)
    # Cells are filled up with blanks, the last ones of a line for nothing.
    for line in captured.get().splitlines():
        console.file.write(line.rstrip() + "\n")


def _console(file: IO[str]) -> Console:
    terminal = file.isatty()
    return Console(
        file=file,
        markup=False,
        highlight=False,
        emoji=False,
        no_color=None if terminal else True,
        width=None if terminal else _UNFOLDED,
    )
