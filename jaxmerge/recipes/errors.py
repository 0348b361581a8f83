"""Errors of recipes and plans: all that is wrong at once, each with its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxmerge.tree import nearest

_SHOWN = 40


class Problem(NamedTuple):
    """One thing that is wrong, and the line of the recipe that it stands on (from 1)."""

    line: int | None
    message: str


class RecipeError(ValueError):
    """A recipe that cannot be understood.

    Attributes:
        problems: all that was found, in the order of the recipe's lines.
        filename: the recipe's name as shown.
        line: the line of the first problem, from 1; None where no line can be named.

    >>> print(RecipeError("`models` is empty", filename="soup.yaml", line=3))
    soup.yaml:3: `models` is empty
    """

    def __init__(
        self,
        problems: str | Sequence[Problem],
        *,
        filename: str = "<recipe>",
        line: int | None = None,
    ) -> None:
        if isinstance(problems, str):
            problems = [Problem(line, problems)]
        # A stable sort: problems without a line come first, as they concern the whole file.
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line or 0))
        self.filename = filename
        self.line = self.problems[0].line if self.problems else None
        super().__init__(_shown([place(filename, *problem) for problem in self.problems]))


class PlanError(ValueError):
    """A merge that cannot run: found from headers, before any tensor is read.

    Attributes:
        problems: every problem as one line of text.

    >>> print(PlanError(["a: tensor 'w' is missing", "no space"]))
    2 problems:
      a: tensor 'w' is missing
      no space
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = _shown([f"  {problem}" for problem in self.problems])
            super().__init__(f"{len(self.problems)} problems:\n{lines}")


def place(filename: str, line: int | None, message: str) -> str:
    """Puts `filename:line: ` before a message.

    >>> place("a.yaml", 4, "unknown key")
    'a.yaml:4: unknown key'
    """
    return f"{filename}: {message}" if line is None else f"{filename}:{line}: {message}"


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Returns a question with the nearest valid name, then all of them when they are few.

    >>> did_you_mean("wieght", ["weight", "normalize"])
    "; did you mean 'weight'? Valid here: normalize, weight"
    """
    names = sorted(set(valid))
    question = nearest(name, names)
    if not names or len(names) > 60:
        return question
    return f"{question or ';'} {'Valid' if question else 'valid'} here: {', '.join(names)}"


def _shown(lines: Sequence[str]) -> str:
    rest = len(lines) - _SHOWN
    return "\n".join([*lines[:_SHOWN], *([f"... and {rest} more"] if rest > 0 else [])])
