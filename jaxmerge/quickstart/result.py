"""What the quickstart returns, and the table that shows it."""

from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["source", "ensemble", "method", "best", "reference"]


class Row(NamedTuple):
    """One model, or the ensemble, with its accuracy on the test digits.

    Attributes:
      name: as tables show it.
      kind: a "source" of the merge; the "ensemble" of the experts; a "method" at its defaults;
        the "best" candidate; the "reference" that was trained on all digits.
      accuracy: share of all test images classified rightly.
      groups: that share among each expert's digits.
    """

    name: str
    kind: Kind
    accuracy: float
    groups: tuple[float, ...]


class QuickstartResult(NamedTuple):
    """The quickstart's outcome.

    Attributes:
      folder: where everything was written.
      rows: the table, in its order.
      group_names: each expert's digits, as "0-3".
      candidates: how many merges were tried.
      best_method: of the best candidate.
      best_hyperparams: its numbers, as in its recipe.
      best_validation: its accuracy on the validation digits.
      seconds: wall time by phase.
    """

    folder: Path
    rows: tuple[Row, ...]
    group_names: tuple[str, ...]
    candidates: int
    best_method: str
    best_hyperparams: dict[str, float | tuple[float, ...]]
    best_validation: float
    seconds: dict[str, float]

    @property
    def header(self) -> tuple[str, ...]:
        """The table's head."""
        return "accuracy on test digits, %", "all", *self.group_names

    def cells(self) -> list[tuple[str, ...]]:
        """The table's rows as text, percent with one decimal."""
        return [
            (row.name, *(f"{100 * share:.1f}" for share in (row.accuracy, *row.groups)))
            for row in self.rows
        ]

    @property
    def best(self) -> Row:
        """The row of the best candidate."""
        return next(row for row in self.rows if row.kind == "best")

    @property
    def summary(self) -> str:
        """What the table says, in a sentence."""
        base = self.rows[0].accuracy
        expert = max(row.accuracy for row in self.rows[1:] if row.kind == "source")
        ensemble = next(row.accuracy for row in self.rows if row.kind == "ensemble")
        return (
            f"Merged from {len(self.group_names)} experts into one network: "
            f"{100 * self.best.accuracy:.1f} % of all digits right. The base has "
            f"{100 * base:.1f} %, the best expert alone {100 * expert:.1f} %, and the ensemble, "
            f"which runs {len(self.group_names)} networks, {100 * ensemble:.1f} %."
        )
