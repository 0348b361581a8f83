"""What is known of a value while a program is walked through: its axes' labels, or the value itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from jaxmerge.align.symmetry.atoms import Atom, Label, fix, fixed_axis, proper

# Where an operation stands: its index in the program, after those of the operations that it is within.
Position = tuple[int, ...]


@dataclass(frozen=True)
class Traced:
    """A value that depends on parameters or inputs.

    Attributes:
      labels: per axis, what it is.
      path: the parameter leaf that the value is but for layout and casts, or None.
    """

    labels: list[Label]
    path: str | None = None


@dataclass(frozen=True)
class Known:
    """A value that depends on neither."""

    array: Any


Value = Traced | Known


@dataclass
class Uses:
    """How the program uses its parameter leaves.

    Attributes:
      axes: per leaf, the atom that each of its axes began as.
      contracted: per leaf, the atoms over which it is contracted.
      looked_up: the leaves that are indexed, as an embedding is.
      seen: all leaves that the program reads.
      read: per leaf, the atoms of those parts of it that an operation computes with.
      operations: every operation in the order in which they run: where it stands (its index in the program, and in
        those that it is within), itself, its operands.
    """

    axes: dict[str, list[Atom | None]]
    contracted: dict[str, list[Atom]] = field(default_factory=dict)
    looked_up: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    read: dict[str, list[Atom]] = field(default_factory=dict)
    operations: list[tuple[Position, JaxprEqn, list[Value]]] = field(default_factory=list)
    within: list[int] = field(default_factory=list)

    def contract(self, value: Value, labels: Sequence[Label]) -> None:
        """Notes that a leaf is contracted over these axes."""
        if isinstance(value, Traced) and value.path is not None:
            atoms = self.contracted.setdefault(value.path, [])
            atoms += [atom for label in labels for segment in label or [] for atom in segment]

    def contracts(self, path: str, axis: int) -> bool:
        """Whether the leaf is contracted over this axis, or a part of it."""
        mine = self.axes[path][axis]
        if mine is None:
            return False
        whole = {a for a in self.axes[path] if a is not None}
        parts = set(proper(mine))
        return any(
            atom is mine or (atom not in whole and not parts.isdisjoint(proper(atom)))
            for atom in self.contracted.get(path, ())
        )


def labels_of(value: Value) -> list[Label]:
    """The labels of a value; a constant's axes are fixed where its entries differ."""
    if isinstance(value, Traced):
        return list(value.labels)
    array = np.asarray(value.array)
    return [
        None if _constant_along(array, axis) else fixed_axis(n)
        for axis, n in enumerate(array.shape)
    ]


def shape_of(variable: Any) -> tuple[int, ...]:
    """The shape of a variable or literal of a program."""
    return tuple(variable.aval.shape)


def opaque(shape: Sequence[int]) -> Traced:
    """A value of which nothing is known."""
    return Traced([fixed_axis(size) for size in shape])


def give_up(values: Sequence[Value]) -> None:
    """Forbids every relabelling of what an unknown operation reads."""
    for value in values:
        if isinstance(value, Traced):
            for label in value.labels:
                fix(label)


def _constant_along(array: np.ndarray, axis: int) -> bool:
    if array.shape[axis] == 1 or array.size == 0:
        return True
    first = np.take(array, [0], axis)
    return bool(np.all(array == first)) if array.dtype.kind != "V" else False
