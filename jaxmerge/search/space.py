"""`space`: a tree of variables, and the flat genome that strategies see."""

import functools
import graphlib
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef

from jaxmerge.search.variables import (
    Binary,
    Categorical,
    Continuous,
    Integer,
    Kind,
    Variable,
    When,
)
from jaxmerge.tree import flatten, nearest, unflatten


@dataclass(frozen=True)
class Column:
    """One scalar variable.

    Attributes:
      path: its path, with its place in an array, as in "weight[2]".
      kind: "continuous", "integer", "binary" or "categorical".
      start: its first coordinate in the genome.
      width: how many coordinates it has: 1, or the number of choices.
      parents: pairs (column, level) that must all hold, else it is inactive; a level counts from 0.
    """

    path: str
    kind: Kind
    start: int
    width: int
    parents: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Space:
    """What a search varies; made by `space`. Compares by value, and may be a static argument.

    A genome is float32 [size]: the coordinates of the tree's variables in the order of its leaves, row-major. Every
    coordinate lies in [0, 1]; `decode` clips. A continuous variable has one, mapped to its bounds; an integer one, cut
    into equal cells; a binary one, on above 0.5; a categorical one has a coordinate for each choice, of which the
    largest wins.

    Attributes:
      variables: pairs (path, variable) in the order of the tree's leaves.
      definition: the tree's structure.
    """

    variables: tuple[tuple[str, Variable], ...]
    definition: PyTreeDef

    @functools.cached_property
    def columns(self) -> tuple[Column, ...]:
        """The scalar variables in the order of the genome."""
        first = self._first_columns
        by_path = dict(self.variables)
        columns: list[Column] = []
        start = 0
        for path, variable in self.variables:
            conditions = [
                (first[one.path], _level(one, by_path), _elements(one, variable, by_path))
                for one in variable.when
            ]
            for i, place in enumerate(np.ndindex(variable.shape)):
                parents = tuple((at + e[i], level) for at, level, e in conditions if e[i] >= 0)
                name = f"{path}[{','.join(map(str, place))}]" if place else path
                columns.append(Column(name, variable.kind, start, variable.width, parents))
                start += variable.width
        return tuple(columns)

    @functools.cached_property
    def size(self) -> int:
        """The number of coordinates."""
        return sum(variable.count * variable.width for _, variable in self.variables)

    @functools.cached_property
    def levels(self) -> np.ndarray:
        """int32 [columns]: the number of values of each scalar variable; 0 for a continuous one."""
        counts = [np.full(variable.count, variable.levels) for _, variable in self.variables]
        return np.concatenate(counts).astype(np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A word that other spaces do not have: a checkpoint is told by it."""
        text = f"{self.variables!r} {self.definition}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def decode(self, genome: jax.Array) -> Any:
        """Reads a genome.

        Pure; may be compiled and mapped; differentiable in the coordinates of continuous variables.

        Args:
          genome: float32 [size].

        Returns:
          The tree, with float32 (continuous), int32 (integer, or the index of a named choice), the numbers (of a
          categorical variable over numbers) or bool (binary) arrays of the variables' shapes. What is inactive has its
          initial value.

        Raises:
          ValueError: another shape.
        """
        parts = list(self._parts(genome))
        active = self._active_columns(parts)
        leaves = []
        start = 0
        for (_, variable), part in zip(self.variables, parts, strict=True):
            value = variable.decode(part)
            if active is not None:
                mine = active[start : start + variable.count]
                value = jnp.where(mine, value, jnp.asarray(variable.values))
            leaves.append(value.reshape(variable.shape))
            start += variable.count
        return unflatten(self.definition, leaves)

    def active(self, genome: jax.Array) -> jax.Array:
        """Tells which coordinates count.

        Args:
          genome: float32 [size].

        Returns:
          bool [size]: False for the coordinates of a variable one of whose conditions does not hold.
        """
        active = self._active_columns(list(self._parts(genome)))
        if active is None:
            return jnp.ones(self.size, bool)
        return active[self._column_of]

    def initial_genome(self) -> jax.Array:
        """The genome from which a search sets out, float32 [size].

        Initial values of continuous and integer variables, the probability of binary ones, and 0.5 for each choice of
        categorical ones.
        """
        parts = [variable.start().ravel() for _, variable in self.variables]
        return jnp.asarray(np.concatenate(parts), jnp.float32)

    def encode(self, tree: Any) -> jax.Array:
        """Writes a point as a genome, so that `decode` gives it back up to rounding.

        Args:
          tree: like what `decode` returns, of concrete numbers or nested lists; names may stand for choices with names.

        Returns:
          float32 [size].

        Raises:
          ValueError: another structure or shape, a value out of bounds or none of the choices.
        """
        try:
            leaves = self.definition.flatten_up_to(tree)
        except ValueError as error:
            given, known = list(flatten(tree)[0]), [path for path, _ in self.variables]
            for path in given:
                if path not in known:
                    text = f"the space has no variable {path!r}{nearest(path, known)}"
                    raise ValueError(text) from None
            lacking = [path for path in known if path not in given]
            text = f"no value for the variable {lacking[0]!r}" if lacking else str(error)
            raise ValueError(text) from None
        parts = []
        for (path, variable), leaf in zip(self.variables, leaves, strict=True):
            value = np.asarray(leaf)
            if value.shape != variable.shape:
                raise ValueError(
                    f"{path}: expected shape {list(variable.shape)}, found {list(value.shape)}"
                )
            parts.append(variable.encode(value.ravel(), path).ravel())
        return jnp.asarray(np.concatenate(parts), jnp.float32)

    def _parts(self, genome: jax.Array) -> Iterator[jax.Array]:
        """The coordinates of each variable: [count, width]."""
        if jnp.shape(genome) != (self.size,):
            raise ValueError(
                f"expected a genome of shape [{self.size}], found {list(jnp.shape(genome))}; "
                "a population is decoded by jax.vmap"
            )
        genome = jnp.clip(jnp.asarray(genome, jnp.float32), 0.0, 1.0)
        start = 0
        for _, variable in self.variables:
            size = variable.count * variable.width
            yield genome[start : start + size].reshape(variable.count, variable.width)
            start += size

    def _active_columns(self, parts: list[jax.Array]) -> jax.Array | None:
        """bool [columns]; None where nothing has a condition."""
        parents, choices, depth = self._conditions
        if depth == 0:
            return None
        level = jnp.concatenate(
            [
                jnp.zeros(one.count, jnp.int32) if isinstance(one, Continuous) else one.level(part)
                for (_, one), part in zip(self.variables, parts, strict=True)
            ]
        )
        holds = (level[parents] == choices) | (parents < 0)
        active = jnp.all(holds, axis=1)
        for _ in range(depth - 1):
            active = jnp.all(holds & (active[parents] | (parents < 0)), axis=1)
        return active

    @functools.cached_property
    def _conditions(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Parents and their levels, [columns, most parents] (-1: none), and the length of the longest chain."""
        most = max(len(column.parents) for column in self.columns)
        parents = np.full((len(self.columns), most), -1, np.int32)
        choices = np.zeros_like(parents)
        for i, column in enumerate(self.columns):
            for j, (parent, level) in enumerate(column.parents):
                parents[i, j], choices[i, j] = parent, level
        depth = dict.fromkeys((path for path, _ in self.variables), 0)
        by_path = dict(self.variables)
        for path in _in_order(by_path):
            depth[path] = max((depth[one.path] + 1 for one in by_path[path].when), default=0)
        return parents, choices, max(depth.values())

    @functools.cached_property
    def _column_of(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.columns)), [column.width for column in self.columns])

    @functools.cached_property
    def _first_columns(self) -> dict[str, int]:
        counts = [variable.count for _, variable in self.variables]
        starts = itertools.accumulate([0, *counts[:-1]])
        return {path: start for (path, _), start in zip(self.variables, starts, strict=True)}


def space(tree: Any) -> Space:
    """Makes a search space of a tree of variables.

    Args:
      tree: any pytree whose leaves are made by `continuous`, `integer`, `categorical` or `binary`. `decode` returns a
        tree of the same structure, so that one shaped like a method's hyperparameters goes into its `apply`.

    Returns:
      The space.

    Raises:
      ValueError: no variables, a condition on what is not there, on a continuous variable, on a choice that the
        parent does not have, on parents of another shape without `index`, or conditions in a circle.
      TypeError: a leaf that is no variable.

    Example:
      >>> import jax, jaxmerge as jm
      >>> space = jm.search.space({
      ...     "weight": jm.search.continuous(-2.0, 2.0, shape=(3,)), "on": jm.search.binary()})
      >>> space.size
      4
      >>> space.decode(space.initial_genome())["weight"]
      Array([0., 0., 0.], dtype=float32)
    """
    leaves, definition = flatten(tree)
    for path, leaf in leaves.items():
        if not isinstance(leaf, Continuous | Integer | Categorical | Binary):
            raise TypeError(
                f"{path or 'the space'}: expected a variable (continuous, integer, categorical, "
                f"binary), found {leaf!r}"
            )
    if not leaves:
        raise ValueError("the space has no variables")
    for path, variable in leaves.items():
        for condition in variable.when:
            _check_condition(path, variable, condition, leaves)
    _in_order(leaves)
    made = Space(tuple(leaves.items()), definition)
    _check_possible(made)
    return made


def _check_condition(
    path: str, variable: Variable, condition: When, leaves: dict[str, Variable]
) -> None:
    where = f"{path}: when({condition.path!r})"
    parent = leaves.get(condition.path)
    if parent is None:
        others = [name for name in leaves if name != path]
        raise ValueError(
            f"{where}: there is no such variable{nearest(condition.path, others)}; "
            f"there are {', '.join(map(repr, others)) or 'no others'}"
        )
    if isinstance(parent, Continuous):
        raise ValueError(f"{where}: a continuous variable cannot be a condition")
    if parent.level_of(condition.choice) is None:
        hint = nearest(str(condition.choice), map(str, parent.choices))
        raise ValueError(
            f"{where}: {condition.choice!r} is no value of it{hint}; it has {_some(parent.choices)}"
        )
    if condition.index is None:
        if parent.shape not in ((), (1,), variable.shape):
            raise ValueError(
                f"{where}: shape {list(variable.shape)} does not match the parent's "
                f"{list(parent.shape)}; say by index= which element each one depends on"
            )
        return
    if condition.shape != variable.shape:
        raise ValueError(
            f"{where}: index has shape {list(condition.shape)}, expected {list(variable.shape)}"
        )
    for element in condition.index:
        if not -1 <= element < parent.count:
            raise ValueError(
                f"{where}: index {element} names no element; the parent has {parent.count}"
            )


def _check_possible(made: Space) -> None:
    """No variable may need two values of one parent, its parents' own conditions included."""
    needs: dict[int, dict[int, int]] = {}

    def needed(i: int) -> dict[int, int]:
        if i in needs:
            return needs[i]
        found: dict[int, int] = {}
        for parent, level in made.columns[i].parents:
            for at, value in [(parent, level), *needed(parent).items()]:
                if found.setdefault(at, value) != value:
                    raise ValueError(
                        f"{made.columns[i].path} can never be active: its conditions need two "
                        f"values of {made.columns[at].path!r} at once"
                    )
        needs[i] = found
        return found

    for i in range(len(made.columns)):
        needed(i)


def _in_order(leaves: dict[str, Variable]) -> list[str]:
    """Parents first."""
    graph = {path: [one.path for one in variable.when] for path, variable in leaves.items()}
    try:
        return list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(map(repr, error.args[1]))
        raise ValueError(f"conditions in a circle: {circle}") from None


def _level(condition: When, by_path: dict[str, Variable]) -> int:
    parent = by_path[condition.path]
    assert not isinstance(parent, Continuous)
    level = parent.level_of(condition.choice)
    assert level is not None
    return level


def _elements(condition: When, variable: Variable, by_path: dict[str, Variable]) -> list[int]:
    """The parent's element for each element of a variable; -1 for none."""
    if condition.index is not None:
        return list(condition.index)
    single = by_path[condition.path].count == 1
    return [0] * variable.count if single else list(range(variable.count))


def _some(choices: Any) -> str:
    shown = ", ".join(repr(choice) for choice in itertools.islice(choices, 8))
    return f"{shown}, ..." if len(choices) > 8 else shown
