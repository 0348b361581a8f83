"""Assignment by shortest augmenting paths, compiled: many paths at once, whatever the ties."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_BITS = 24
"""To how many bits the similarities are rounded: as many as a float32 has."""
_FAR = 2**30
"""A distance beyond all others."""


class _State(NamedTuple):
    """A partial assignment with its prices.

    Attributes:
      rows: int32 [n], the price of each row; a cost less the prices of its row and column is never negative, and is 0
        where the row has the column.
      columns: int32 [n], the price of each column.
      column_of: int32 [n], the column of each row, -1 for none.
      row_of: int32 [n], the row of each column, -1 for none.
    """

    rows: jax.Array
    columns: jax.Array
    column_of: jax.Array
    row_of: jax.Array


# Where each way back has come to, and the columns of rows and rows of columns given so far.
_Ways = tuple[jax.Array, jax.Array, jax.Array]


class _Forest(NamedTuple):
    """Shortest ways from the rows without a column, each column in the tree of one of them.

    Attributes:
      row: int32 [n], each row's distance.
      column: int32 [n], each column's.
      parent: int32 [n], the row through which a column is reached.
      root: int32 [n], the row without a column at the root of a column's tree.
      grows: bool [], whether the last step changed anything.
    """

    row: jax.Array
    column: jax.Array
    parent: jax.Array
    root: jax.Array
    grows: jax.Array


def paths(similarity: jax.Array) -> jax.Array:
    """Solves assignments exactly, for similarities rounded to 24 bits of their range.

    Turn by turn a shortest way is found from every row that has no column, all at once; each tree that reaches a column
    that has no row gives columns to rows along its way. Of equally short ways one is taken at random, so that rows that
    are equal (dead units) do not stand in each other's way. Arithmetic is in integers: nothing is lost to rounding.

    Args:
      similarity: [..., n, n] finite floats.

    Returns:
      int32 [..., n], the columns.
    """
    n = similarity.shape[-1]
    flat = similarity.reshape(-1, n, n)
    return jax.vmap(_solve)(flat).reshape(similarity.shape[:-1])


def _solve(similarity: jax.Array) -> jax.Array:
    n = similarity.shape[-1]
    low, high = jnp.min(similarity), jnp.max(similarity)
    share = (high - similarity) / jnp.where(high > low, high - low, 1)
    cost = jnp.round(share * (2**_BITS - 1)).astype(jnp.int32)
    chance = _mixed(n)
    rows = jnp.min(cost, axis=1)
    columns = jnp.min(cost - rows[:, None], axis=0)
    nobody = jnp.full(n, -1, jnp.int32)

    def incomplete(state: _State) -> jax.Array:
        return jnp.any(state.column_of < 0)

    def turn(state: _State) -> _State:
        forest = _grow(cost, chance, state)
        ends, reach = _ends(forest, state)
        rise = jnp.maximum(reach - forest.row, 0)
        fall = jnp.maximum(reach - forest.column, 0)
        priced = state._replace(rows=state.rows + rise, columns=state.columns - fall)
        return _give(priced, forest, ends)

    return jax.lax.while_loop(incomplete, turn, _State(rows, columns, nobody, nobody)).column_of


def _grow(cost: jax.Array, chance: jax.Array, state: _State) -> _Forest:
    """Finds all shortest ways, one more step of each way at a time."""
    n = len(cost)
    free = state.column_of < 0
    index = jnp.arange(n, dtype=jnp.int32)

    def step(forest: _Forest) -> _Forest:
        start = forest.row - state.rows
        ways = start[:, None] + cost - state.columns[None]
        ways = jnp.where((forest.row < _FAR)[:, None], ways, _FAR)
        shortest = jnp.min(ways, axis=0)
        draw = jnp.where(ways == shortest[None], chance, 0)
        through = jnp.argmax(draw, axis=0).astype(jnp.int32)
        nearer = shortest < forest.column
        column = jnp.where(nearer, shortest, forest.column)
        parent = jnp.where(nearer, through, forest.parent)
        above = jnp.where(free, index, forest.root[state.column_of])
        root = jnp.where(nearer, above[through], forest.root)
        row = jnp.where(free, 0, column[state.column_of])
        return _Forest(row, column, parent, root, jnp.any(nearer))

    nowhere = jnp.full(n, -1, jnp.int32)
    far = jnp.full(n, _FAR, jnp.int32)
    start = _Forest(jnp.where(free, 0, far), far, nowhere, nowhere, jnp.bool_(True))
    return jax.lax.while_loop(lambda forest: forest.grows, step, start)


def _ends(forest: _Forest, state: _State) -> tuple[jax.Array, jax.Array]:
    """Per row without a column the nearest column of its tree that has no row (or n), and the longest way to one."""
    n = len(forest.column)
    open_ = (state.row_of < 0) & (forest.column < _FAR)
    root = jnp.where(open_, forest.root, n)
    nearest = jnp.full(n, _FAR, jnp.int32).at[root].min(forest.column, mode="drop")
    best = open_ & (forest.column == nearest[forest.root])
    index = jnp.arange(n, dtype=jnp.int32)
    ends = jnp.full(n, n, jnp.int32).at[jnp.where(best, root, n)].min(index, mode="drop")
    return ends, jnp.max(jnp.where(ends < n, nearest, 0))


def _give(state: _State, forest: _Forest, ends: jax.Array) -> _State:
    """Gives columns to rows along the ways to the ends, from there back to the roots."""
    n = len(ends)
    before = state.column_of

    def going(carried: _Ways) -> jax.Array:
        return jnp.any(carried[0] < n)

    def back(carried: _Ways) -> _Ways:
        column, column_of, row_of = carried
        row = jnp.where(column < n, forest.parent[jnp.minimum(column, n - 1)], n)
        column_of = column_of.at[row].set(column, mode="drop")
        row_of = row_of.at[column].set(row, mode="drop")
        left = jnp.where(row < n, before[jnp.minimum(row, n - 1)], -1)
        return jnp.where(left >= 0, left, n), column_of, row_of

    _, column_of, row_of = jax.lax.while_loop(going, back, (ends, before, state.row_of))
    return state._replace(column_of=column_of, row_of=row_of)


def _mixed(n: int) -> jax.Array:
    """int32 [n, n], positive numbers that look random."""
    x = jnp.arange(n * n, dtype=jnp.uint32).reshape(n, n)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return ((x ^ (x >> 16)) >> 1).astype(jnp.int32) | 1
