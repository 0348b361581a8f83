"""Values of a recipe's parameters: a number, a gradient over layers, or a choice by tensors' names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# YAML 1.1 reads 1e-5 (no point) as text.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WORDS = {"true": 1.0, "false": 0.0}

Value = float | tuple[float, ...]


@dataclass(frozen=True)
class Choice:
    """A value for the tensors whose names contain a text.

    Attributes:
        filter: the text; None or "*" for every tensor.
        value: a number, or a gradient.
    """

    filter: str | None
    value: Value

    def matches(self, name: str) -> bool:
        """Whether the value is for the tensor of this name."""
        return self.filter in (None, "*") or (self.filter or "") in name


Setting = Value | tuple[Choice, ...]


def read_setting(value: object) -> Setting:
    """Reads a parameter's value as YAML gives it.

    Raises:
        ValueError: on anything else than a finite number or flag, a list of them, `{filter, value}`
            or a list of those.

    >>> read_setting([0, "1e-1"])
    (0.0, 0.1)
    >>> read_setting([{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}])
    (Choice(filter='mlp', value=(0.0, 1.0)), Choice(filter=None, value=0.5))
    """
    if isinstance(value, Mapping | Choice):
        return (_choice(value),)
    if isinstance(value, list | tuple) and any(
        isinstance(item, Mapping | Choice) for item in value
    ):
        return tuple(_choice(item) for item in value)
    return _value(value)


def plain_setting(setting: Setting) -> object:
    """Returns the setting as plain data, which `read_setting` reads back.

    >>> plain_setting((Choice("mlp", (0.0, 1.0)), Choice(None, 0.5)))
    [{'filter': 'mlp', 'value': [0.0, 1.0]}, {'value': 0.5}]
    """
    if not isinstance(setting, tuple):
        return setting
    return [
        ({} if item.filter is None else {"filter": item.filter})
        | {"value": plain_setting(item.value)}
        if isinstance(item, Choice)
        else item
        for item in setting
    ]


def evaluate(setting: Setting, name: str, at: float, *, discrete: bool = False) -> float | None:
    """Returns the number for one tensor, or None where no filter lets it through.

    A gradient of k numbers is interpolated linearly between the first layer (`at` = 0) and the
    last one (`at` = 1): with s = at (k - 1) and i = floor(s),

        (1 - (s - i)) v_i + (s - i) v_{i+1}

    Args:
        setting: the setting.
        name: the tensor's name, which filters are looked for in.
        at: where its layer lies among those merged together, from 0 to 1.
        discrete: a gradient is a list to choose v_i from, as for flags.

    >>> evaluate((0.0, 1.0, 0.0), "w", 0.25), evaluate((0.0, 1.0, 0.0), "w", 0.25, discrete=True)
    (0.5, 0.0)
    >>> evaluate((Choice("mlp", 2.0), Choice("attn", 3.0)), "layers.0.attn.q", 0.0)
    3.0
    """
    if not isinstance(setting, tuple):
        return setting
    for item in setting:
        if not isinstance(item, Choice):
            break
        if item.matches(name):
            return evaluate(item.value, name, at, discrete=discrete)
    else:
        return None
    gradient = [item for item in setting if not isinstance(item, Choice)]
    scaled = at * (len(gradient) - 1)
    first = int(scaled)
    if discrete:
        return gradient[first]
    second = min(len(gradient) - 1, first + 1)
    share = scaled - first
    return (1 - share) * gradient[first] + share * gradient[second]


def numbers(setting: Setting) -> Iterator[float]:
    """Gives every number that a setting holds.

    >>> list(numbers((Choice("mlp", (0.0, 1.0)), Choice(None, 0.5))))
    [0.0, 1.0, 0.5]
    """
    if not isinstance(setting, tuple):
        yield setting
        return
    for item in setting:
        yield from numbers(item.value) if isinstance(item, Choice) else (item,)


def filters(setting: Setting) -> tuple[str, ...]:
    """Returns the texts that names are searched for."""
    choices = setting if isinstance(setting, tuple) else ()
    return tuple(
        item.filter
        for item in choices
        if isinstance(item, Choice) and item.filter not in (None, "*")
    )


def varies(setting: Setting) -> bool:
    """Whether the number may differ between layers or tensors."""
    return isinstance(setting, tuple)


def _choice(value: object) -> Choice:
    if isinstance(value, Choice):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("a list holds numbers, or {filter, value} mappings, not both")
    unknown = [str(key) for key in value if key not in ("filter", "value")]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} in a choice of {{filter, value}}")
    if value.get("value") is None:
        raise ValueError("a choice needs a `value`")
    text = value.get("filter")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"`filter` is text that names contain, found {text!r}")
    return Choice(text, _value(value["value"]))


def _value(value: object) -> Value:
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("the list is empty")
        return tuple(_number(item) for item in value)
    return _number(value)


def _number(value: object) -> float:
    if isinstance(value, str):
        text = value.strip()
        value = float(text) if _NUMBER.fullmatch(text) else _WORDS.get(text.lower(), value)
    if isinstance(value, list | tuple):
        raise ValueError("a list within a list")
    if isinstance(value, Mapping):
        raise ValueError("a choice of {filter, value} within another")
    if not isinstance(value, bool | int | float):
        raise ValueError("no value is given" if value is None else f"{value!r} is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number
