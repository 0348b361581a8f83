"""What a benchmark found: tables, printed as they grow and kept as JSON, which results.py reads. Needs no JAX."""

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Cell = Any
"""Text, a number, None for nothing, or {"median", "min", "max"} of several runs in the column's unit."""

VERDICT = "holds"
"""The column that says whether a row keeps its limit: "yes", nothing where there is none, or "no: ..."."""


@dataclass
class Table:
    """One table.

    Attributes:
      title: what it shows.
      columns: the columns' names, with the format of their numbers ("" for text).
      notes: what a reader must know: what is compared, units, limits.
      rows: the cells in the order of the columns.
      pictures: files that show it, from the folder of RESULTS.md.
    """

    title: str
    columns: dict[str, str]
    notes: list[str] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Prints everything but the rows."""
        print(f"\n{self.title}")
        for note in self.notes:
            print(f"  {note}")
        print(self._line(list(self.columns)), flush=True)

    def add(self, **cells: Cell) -> None:
        """Adds and prints a row; columns that are not named stay empty."""
        unknown = cells.keys() - self.columns.keys()
        if unknown:
            raise ValueError(f"the table {self.title!r} has no column {min(unknown)!r}")
        row = [cells.get(name) for name in self.columns]
        self.rows.append(row)
        print(self._line(self.texts(row)), flush=True)

    def texts(self, row: list[Cell]) -> list[str]:
        """The cells as people read them: of several runs, the median."""
        return [_text(cell, form) for cell, form in zip(row, self.columns.values(), strict=True)]

    def missed(self) -> Iterator[str]:
        """A line for every row that does not keep its limit."""
        verdicts = [i for i, name in enumerate(self.columns) if name == VERDICT]
        for row in self.rows:
            for i in verdicts:
                if str(row[i] or "").startswith("no"):
                    yield f"{self.title}: {row[0]} {row[i]}"

    def _line(self, texts: list[str]) -> str:
        first, *rest = texts
        widths = [max(8, len(name)) for name in self.columns][1:]
        cells = [f"{text:>{width}}" for text, width in zip(rest, widths, strict=True)]
        return "  ".join([f"{first:<26}", *cells])


@dataclass
class Report:
    """One run of a benchmark; the fields are those of its JSON."""

    benchmark: str
    summary: str
    machine: dict[str, Any]
    seed: int
    command: str = ""
    tables: list[Table] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.command = self.command or _command()

    def missed(self) -> list[str]:
        return [line for table in self.tables for line in table.missed()]

    def write(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def read(path: Path) -> Report:
    """The report that was written to a file."""
    fields = json.loads(path.read_text())
    return Report(**{**fields, "tables": [Table(**table) for table in fields["tables"]]})


PLACES = (
    "--json",
    "--data",
    "--scratch",
    "--mergekit",
    "--plot",
    "--plots",
    "--cache",
    "--reference",
)
"""Options that say where files lie, which is nobody else's business."""


def _command() -> str:
    """How the benchmark was called, without `PLACES`."""
    given = sys.argv[1:]
    for option in PLACES:
        if option in given:
            at = given.index(option)
            given = given[:at] + given[at + 2 :]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *given])


def _text(cell: Cell, form: str) -> str:
    if isinstance(cell, dict):
        cell = cell["median"]
    if cell is None:
        return ""
    return cell if isinstance(cell, str) else format(cell, form)
