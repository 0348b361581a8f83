"""The variables of a search space: what one may be, and how it is read from coordinates in [0, 1]."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.tree import nearest

Kind = Literal["continuous", "integer", "binary", "categorical"]
Scale = Literal["linear", "log"]

# The centres of two cells: far enough from the border that a small step does not cross it.
_OFF, _ON = 0.25, 0.75
# Cells that float32 still tells apart at their centres.
_MOST_VALUES = 2**22


@dataclass(frozen=True)
class When:
    """A condition on another variable; made by `when`.

    Attributes:
      path: the parent's path in the space.
      choice: the parent's value under which this variable counts.
      index: the parent's element that each element depends on, row-major; -1 for none; None for the parent's one
        element, or element by element where the shapes are equal.
      shape: the shape of `index`.
    """

    path: str
    choice: Any = True
    index: tuple[int, ...] | None = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Variable:
    shape: tuple[int, ...]
    when: tuple[When, ...]

    @property
    def count(self) -> int:
        """How many scalar variables it stands for."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Coordinates of each."""
        return 1


@dataclass(frozen=True)
class Continuous(_Variable):
    """See `continuous`; `initial` has a value for each element."""

    low: float
    high: float
    scale: Scale
    initial: tuple[float, ...]

    kind: Kind = "continuous"
    levels: int = 0

    def decode(self, coordinates: jax.Array) -> jax.Array:
        """[count, 1] in [0, 1] -> float32 [count] within the bounds."""
        low, high = self._bounds
        share = coordinates[:, 0]
        if self.scale == "log":
            start, stop = math.log(self.low), math.log(self.high)
            value = jnp.exp(start + share * (stop - start))
        else:
            # A weighted mean: the difference of the bounds may overflow.
            value = (1 - share) * low + share * high
        return jnp.clip(value, low, high)

    def encode(self, values: np.ndarray, path: str) -> np.ndarray:
        """[count] -> [count, 1]."""
        values = values.astype(np.float64)
        # Values are float32 where they were decoded.
        slack = 1e-6 * max(abs(self.low), abs(self.high))
        bad = ~((values >= self.low - slack) & (values <= self.high + slack))
        if bad.any():
            raise ValueError(
                f"{path}: {values[bad][0]:g} does not lie in [{self.low:g}, {self.high:g}]"
            )
        values = np.clip(values, self.low, self.high)
        if self.scale == "log":
            start, stop = math.log(self.low), math.log(self.high)
            share = (np.log(values) - start) / (stop - start)
        else:
            share = (values / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return np.clip(share, 0.0, 1.0)[:, None]

    @property
    def values(self) -> np.ndarray:
        """The initial value of each element."""
        low, high = self._bounds
        return np.clip(np.asarray(self.initial, np.float32), low, high)

    def start(self) -> np.ndarray:
        """The coordinates from which a search sets out: [count, 1]."""
        return self.encode(np.asarray(self.initial), "initial")

    @property
    def _bounds(self) -> tuple[np.float32, np.float32]:
        """The bounds in float32, rounded inwards."""
        low, high = np.float32(self.low), np.float32(self.high)
        low = np.nextafter(low, np.float32(np.inf)) if float(low) < self.low else low
        high = np.nextafter(high, np.float32(-np.inf)) if float(high) > self.high else high
        return low, high


@dataclass(frozen=True)
class Integer(_Variable):
    """See `integer`; `initial` has a value for each element."""

    low: int
    high: int
    initial: tuple[int, ...]

    kind: Kind = "integer"

    @property
    def levels(self) -> int:
        """How many values there are."""
        return self.high - self.low + 1

    def level(self, coordinates: jax.Array) -> jax.Array:
        """[count, 1] in [0, 1] -> int32 [count], from 0."""
        cell = jnp.floor(coordinates[:, 0] * np.float32(self.levels)).astype(jnp.int32)
        return jnp.clip(cell, 0, self.levels - 1)

    def decode(self, coordinates: jax.Array) -> jax.Array:
        """[count, 1] in [0, 1] -> int32 [count]."""
        return self.low + self.level(coordinates)

    def encode(self, values: np.ndarray, path: str) -> np.ndarray:
        """[count] -> [count, 1], the centres of the cells."""
        bad = ~((values >= self.low) & (values <= self.high) & (values == np.round(values)))
        if bad.any():
            raise ValueError(
                f"{path}: {values[bad][0]:g} is no whole number in [{self.low}, {self.high}]"
            )
        return ((values.astype(np.float64) - self.low + 0.5) / self.levels)[:, None]

    def level_of(self, choice: Any) -> int | None:
        """The level of a value; None where there is none."""
        number = isinstance(choice, numbers.Real) and not isinstance(choice, bool)
        return (
            int(choice) - self.low if number and choice in range(self.low, self.high + 1) else None
        )

    @property
    def choices(self) -> Sequence[Any]:
        """The values."""
        return range(self.low, self.high + 1)

    @property
    def values(self) -> np.ndarray:
        """The initial value of each element."""
        return np.asarray(self.initial, np.int32)

    def start(self) -> np.ndarray:
        """The coordinates from which a search sets out: [count, 1]."""
        return self.encode(self.values, "initial")


@dataclass(frozen=True)
class Categorical(_Variable):
    """See `categorical`."""

    choices: tuple[Any, ...]

    kind: Kind = "categorical"

    @property
    def levels(self) -> int:
        """How many choices there are."""
        return len(self.choices)

    @property
    def width(self) -> int:
        """A coordinate for each choice."""
        return len(self.choices)

    @property
    def table(self) -> np.ndarray | None:
        """The numbers that the choices are, or None where they are names."""
        if any(isinstance(choice, str) for choice in self.choices):
            return None
        whole = all(isinstance(choice, int) for choice in self.choices)
        return np.asarray(self.choices, np.int32 if whole else np.float32)

    def level(self, coordinates: jax.Array) -> jax.Array:
        """[count, choices] -> int32 [count], the largest; the first of equal ones."""
        return jnp.argmax(coordinates, axis=1).astype(jnp.int32)

    def decode(self, coordinates: jax.Array) -> jax.Array:
        """[count, choices] -> [count]: int32 indices, or the numbers."""
        level = self.level(coordinates)
        return level if self.table is None else jnp.asarray(self.table)[level]

    def encode(self, values: np.ndarray, path: str) -> np.ndarray:
        """[count] names, or what `decode` returns -> [count, choices]."""
        if self.table is None and values.dtype.kind in "iuf":
            levels = [int(i) if i in range(self.levels) else None for i in values.tolist()]
        else:
            levels = [self.level_of(one) for one in values.tolist()]
        for value, level in zip(values.tolist(), levels, strict=True):
            if level is None:
                hint = nearest(str(value), map(str, self.choices))
                raise ValueError(
                    f"{path}: {value!r} is none of the choices {list(self.choices)}{hint}"
                )
        return np.where(np.eye(self.levels, dtype=bool)[np.asarray(levels, int)], _ON, _OFF)

    def level_of(self, choice: Any) -> int | None:
        """The level of a choice; None where there is none."""
        if self.table is not None and isinstance(choice, numbers.Real):
            found = np.flatnonzero(self.table == np.asarray(choice, self.table.dtype))
            return int(found[0]) if found.size else None
        return self.choices.index(choice) if choice in self.choices else None

    @property
    def values(self) -> np.ndarray:
        """The initial value of each element: the first choice."""
        first = 0 if self.table is None else self.table[0]
        return np.full(self.count, first, np.int32 if self.table is None else self.table.dtype)

    def start(self) -> np.ndarray:
        """The coordinates from which a search sets out: no choice is preferred."""
        return np.full((self.count, self.levels), 0.5)


@dataclass(frozen=True)
class Binary(_Variable):
    """See `binary`."""

    probability: tuple[float, ...]

    kind: Kind = "binary"
    levels: int = 2
    choices: tuple[bool, bool] = (False, True)

    def level(self, coordinates: jax.Array) -> jax.Array:
        """[count, 1] -> int32 [count]."""
        return self.decode(coordinates).astype(jnp.int32)

    def decode(self, coordinates: jax.Array) -> jax.Array:
        """[count, 1] -> bool [count]."""
        return coordinates[:, 0] > 0.5

    def encode(self, values: np.ndarray, path: str) -> np.ndarray:
        """[count] -> [count, 1], the centres of the cells."""
        bad = (values != 0) & (values != 1)
        if bad.any():
            raise ValueError(f"{path}: {values[bad][0]} is neither true nor false")
        return np.where(values != 0, _ON, _OFF)[:, None]

    def level_of(self, choice: Any) -> int | None:
        """The level of a value; None where there is none."""
        return int(bool(choice)) if isinstance(choice, numbers.Real) and choice in (0, 1) else None

    @property
    def values(self) -> np.ndarray:
        """The initial value of each element."""
        return np.asarray(self.probability) > 0.5

    def start(self) -> np.ndarray:
        """The coordinates from which a search sets out: the probability of being on."""
        return np.asarray(self.probability)[:, None]


Variable = Continuous | Integer | Categorical | Binary
Conditions = When | Sequence[When] | None


def continuous(
    low: float,
    high: float,
    *,
    shape: int | Sequence[int] = (),
    scale: Scale = "linear",
    initial: Any = None,
    when: Conditions = None,
) -> Continuous:
    """Declares real variables with bounds.

    Args:
      low, high: the bounds, both included; finite, low < high.
      shape: of the array that stands in the decoded point.
      scale: "linear"; "log" where ratios count rather than differences (low > 0).
      initial: where a search starts, and the value of what is inactive: a number or an array of `shape`; None for the
        middle on the scale.
      when: one condition or several, made by `when`; all must hold.

    Returns:
      A leaf for `space`.

    Raises:
      ValueError: bounds that are crossed or not finite, a log of what is not positive, an initial value out of bounds.

    Example:
      >>> continuous(1e-3, 10.0, scale="log").initial
      (0.1,)
    """
    call = f"continuous({low}, {high})"
    low, high = _finite(low, call), _finite(high, call)
    if not low < high:
        raise ValueError(f"{call}: the lower bound must be smaller than the upper one")
    if scale not in ("linear", "log"):
        raise ValueError(
            f"{call}: the scale is 'linear' or 'log', found {scale!r}{nearest(str(scale), ['linear', 'log'])}"
        )
    if scale == "log" and low <= 0:
        raise ValueError(f"{call}: a log scale needs a lower bound above 0")
    bounds = np.array([low, high]).astype(np.float32)
    if not bounds[0] < bounds[1] or not np.isfinite(bounds).all():
        raise ValueError(f"{call}: float32 cannot tell the bounds apart, or hold them")
    if scale == "log" and bounds[0] == 0:
        raise ValueError(f"{call}: float32 cannot hold the lower bound")
    size = _shape(shape, call)
    if initial is None:
        initial = math.exp((math.log(low) + math.log(high)) / 2) if scale == "log" else None
        initial = low / 2 + high / 2 if initial is None else round(initial, 12)
        initial = min(max(initial, low), high)
    start = _elements(initial, size, call)
    if not ((start >= low) & (start <= high)).all():
        raise ValueError(f"{call}: the initial value {initial} is out of bounds")
    return Continuous(size, _conditions(when, call), low, high, scale, tuple(start.tolist()))


def integer(
    low: int,
    high: int,
    shape: int | Sequence[int] = (),
    initial: Any = None,
    *,
    when: Conditions = None,
) -> Integer:
    """Declares whole numbers with bounds.

    Args:
      low, high: the bounds, both included; low < high.
      shape: of the int32 array that stands in the decoded point.
      initial: as for `continuous`; None for the middle, rounded down.
      when: as for `continuous`.

    Returns:
      A leaf for `space`.

    Raises:
      ValueError: bounds that are crossed, no whole numbers or too far apart, an initial value out of bounds.

    Example:
      >>> integer(1, 4).initial
      (2,)
    """
    call = f"integer({low}, {high})"
    for bound in (low, high):
        if int(_finite(bound, call)) != bound:
            raise ValueError(f"{call}: the bounds must be whole numbers")
    low, high = int(low), int(high)
    if not low < high:
        raise ValueError(f"{call}: the lower bound must be smaller than the upper one")
    if low < -(2**31) or high >= 2**31 or high - low >= _MOST_VALUES:
        raise ValueError(f"{call}: more than {_MOST_VALUES} values, or beyond int32")
    size = _shape(shape, call)
    start = _elements((low + high) // 2 if initial is None else initial, size, call)
    if not ((start >= low) & (start <= high) & (start == np.round(start))).all():
        raise ValueError(f"{call}: the initial value {initial} is no whole number in the bounds")
    return Integer(size, _conditions(when, call), low, high, tuple(start.astype(int).tolist()))


def categorical(
    choices: Sequence[Any], shape: int | Sequence[int] = (), *, when: Conditions = None
) -> Categorical:
    """Declares variables that take one of several choices without an order.

    Args:
      choices: different names or numbers. The decoded point holds the numbers, or int32 indices where a choice is a
        name.
      shape: of the array that stands in the decoded point.
      when: as for `continuous`.

    Returns:
      A leaf for `space`. What is inactive has the first choice.

    Raises:
      ValueError: no choices, or one twice.
      TypeError: a choice that is neither a name nor a number.

    Example:
      >>> categorical(["linear", "ties"]).levels
      2
    """
    choices = tuple(
        choice.item() if isinstance(choice, np.generic) else choice for choice in choices
    )
    call = f"categorical({list(choices)})"
    for choice in choices:
        if not isinstance(choice, str | int | float):
            raise TypeError(f"{call}: {choice!r} is neither a name nor a number")
        if isinstance(choice, float):
            _finite(choice, call)
    if not choices:
        raise ValueError(f"{call}: there is nothing to choose from")
    twice = [choice for i, choice in enumerate(choices) if choice in choices[:i]]
    if twice:
        raise ValueError(f"{call}: {twice[0]!r} is given twice")
    return Categorical(_shape(shape, call), _conditions(when, call), choices)


def binary(
    shape: int | Sequence[int] = (), probability: Any = 0.5, *, when: Conditions = None
) -> Binary:
    """Declares variables that are on or off.

    Args:
      shape: of the bool array that stands in the decoded point.
      probability: of being on, where a search starts, a number or an array of `shape`; what is inactive is on where
        this exceeds 0.5.
      when: as for `continuous`.

    Returns:
      A leaf for `space`.

    Raises:
      ValueError: a probability outside [0, 1].

    Example:
      >>> binary(shape=(12,), probability=0.3).count
      12
    """
    call = f"binary(probability={probability})"
    size = _shape(shape, call)
    start = _elements(probability, size, call)
    if not ((start >= 0) & (start <= 1)).all():
        raise ValueError(f"{call}: a probability lies in [0, 1]")
    return Binary(size, _conditions(when, call), tuple(start.tolist()))


def when(path: str, choice: Any = True, *, index: Any = None) -> When:
    """Makes a variable depend on another one.

    A variable is active where all its conditions hold and the variables that they name are active themselves. What is
    inactive decodes to its initial value, so that its coordinates cannot change the point.

    Args:
      path: the other variable, by its path in the space, as in "attn/method".
      choice: the value that it must have: True (on) for a binary one, one of the choices or whole numbers else.
      index: an int array of the depending variable's shape: the element of the other one, row-major, on which each
        element depends; -1 where it depends on none. None where the other one has one element, or the same shape.

    Returns:
      A condition for `when=`.

    Example:
      >>> import jaxmerge as jm
      >>> space = jm.search.space({
      ...     "method": jm.search.categorical(["linear", "ties"]),
      ...     "density": jm.search.continuous(0.1, 1.0, when=jm.search.when("method", "ties"))})
      >>> space.active(space.encode({"method": "linear", "density": 0.3})).tolist()
      [False, True, True]
    """
    if not isinstance(path, str):
        raise TypeError(f"when needs the path of a variable, found {path!r}")
    if index is None:
        return When(path, choice)
    array = np.asarray(index)
    if array.dtype.kind not in "iu":
        raise ValueError(f"when({path!r}): index holds whole numbers, found {array.dtype}")
    return When(path, choice, tuple(array.ravel().tolist()), array.shape)


def _finite(value: Any, call: str) -> float:
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{call}: {value!r} is no finite number")
    return float(value)


def _shape(shape: int | Sequence[int], call: str) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    if not all(isinstance(size, int | np.integer) and size > 0 for size in sizes):
        raise ValueError(f"{call}: a shape holds whole numbers above 0, found {shape}")
    return tuple(int(size) for size in sizes)


def _elements(value: Any, shape: tuple[int, ...], call: str) -> np.ndarray:
    array = np.asarray(value, np.float64)
    if array.ndim and array.shape != shape:
        raise ValueError(
            f"{call}: the initial values have shape {list(array.shape)}, not {list(shape)}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{call}: the initial value {value} is not finite")
    return np.broadcast_to(array, shape).ravel()


def _conditions(conditions: Conditions, call: str) -> tuple[When, ...]:
    if conditions is None:
        return ()
    several = (conditions,) if isinstance(conditions, When) else tuple(conditions)
    for one in several:
        if not isinstance(one, When):
            raise TypeError(f"{call}: a condition is made by when(...), found {one!r}")
    return several
