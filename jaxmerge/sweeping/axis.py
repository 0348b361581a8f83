"""One axis of a grid, as written on the command line: `density=0.1:1:8`, `weight[0]=0.5,1`."""

import math
import re
from dataclasses import dataclass

import numpy as np

from jaxmerge.recipes.dialect import library_name

_FORM = re.compile(r"\s*(?P<key>[A-Za-z_]\w*)\s*(?:\[(?P<model>\d+)\])?\s*=(?P<values>.*)")
_WORDS = {"true": 1.0, "yes": 1.0, "on": 1.0, "false": 0.0, "no": 0.0, "off": 0.0}
_HOW = "write name=start:stop:count or name=value,value; name[0]=... is the first model's alone"
_MOST = 1_000_000


@dataclass(frozen=True)
class Axis:
    """One hyperparameter and its values.

    Attributes:
        text: as written.
        key: the name as written, a recipe's word ("lambda") or the library's ("scale").
        name: the library's name.
        model: which of the recipe's models it sets (from 0); None for all.
        values: the numbers, rounded to float32, in which every method computes.
    """

    text: str
    key: str
    name: str
    model: int | None
    values: tuple[float, ...]

    @property
    def label(self) -> str:
        """The name with its model, as in `weight[0]`."""
        return self.key if self.model is None else f"{self.key}[{self.model}]"


def parse_axis(text: str) -> Axis:
    """Reads an axis.

    Args:
        text: `name=start:stop:count` (evenly spaced, both ends included) or `name=v1,v2,...`;
            `name[i]` for the i-th model of the recipe alone; flags may be `true` and `false`.

    Raises:
        ValueError: another form, no number, a number that float32 cannot hold.

    >>> parse_axis("density=0.5:1:3").values
    (0.5, 0.75, 1.0)
    >>> parse_axis("weight[1]=0.25,2").label
    'weight[1]'
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"--grid {text}: {_HOW}")
    key, model = match["key"], match["model"]
    values = _values(text, match["values"].strip())
    return Axis(text, key, library_name(key), None if model is None else int(model), values)


def _values(text: str, written: str) -> tuple[float, ...]:
    if ":" not in written:
        numbers = [_number(text, part) for part in written.split(",")]
    else:
        parts = written.split(":")
        if len(parts) != 3:
            raise ValueError(f"--grid {text}: {_HOW}")
        start, stop = _number(text, parts[0]), _number(text, parts[1])
        if not parts[2].strip().isdecimal() or not 1 <= int(parts[2]) <= _MOST:
            raise ValueError(
                f"--grid {text}: expected a count from 1 to {_MOST}, found {parts[2]!r}"
            )
        numbers = np.linspace(start, stop, int(parts[2])).tolist()
    return tuple(float(np.float32(number)) for number in numbers)


def _number(text: str, written: str) -> float:
    word = written.strip().lower()
    try:
        number = _WORDS[word] if word in _WORDS else float(word)
    except ValueError:
        raise ValueError(f"--grid {text}: {written!r} is not a number; {_HOW}") from None
    if not math.isfinite(number) or abs(number) > float(np.finfo(np.float32).max):
        raise ValueError(f"--grid {text}: {written!r} is not a finite float32 number")
    return number
