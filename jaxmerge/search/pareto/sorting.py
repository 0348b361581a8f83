"""Non-dominated sorting and crowding distance, compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def nondominated_ranks(fitness: ArrayLike, enough: int | None = None) -> jax.Array:
    """Sorts candidates into fronts.

    One candidate dominates another where it is no worse in any objective and better in one. Front 0 is what nobody
    dominates, front r what only earlier fronts dominate.

    Args:
      fitness: float32 [P, k], less is better.
      enough: static; fronts are told apart until they hold so many candidates, and the rest shares the last rank. None:
        all.

    Returns:
      int32 [P], the front of each. O(k P^2), and O(P^2) for each front.

    Example:
      >>> nondominated_ranks(jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [2.0, 2.0]])).tolist()
      [0, 0, 1, 2]

    Reference:
      Deb, Pratap, Agarwal and Meyarivan, A fast and elitist multiobjective genetic algorithm: NSGA-II, IEEE TEC 2002.
    """
    points = jnp.asarray(fitness)
    size = points.shape[0]
    wanted = size if enough is None else min(enough, size)
    no_worse = jnp.all(points[:, None] <= points[None], axis=2)
    dominates = no_worse & ~no_worse.T
    above = jnp.sum(dominates, axis=0)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        ranks, _, front = carry
        return jnp.sum(ranks < front) < wanted

    def peel(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        ranks, above, front = carry
        now = (above == 0) & (ranks == size)
        gone = jnp.sum(dominates & now[:, None], axis=0)
        return jnp.where(now, front, ranks), above - gone, front + 1

    start = (jnp.full(size, size), above, jnp.zeros((), int))
    ranks, _, front = jax.lax.while_loop(unfinished, peel, start)
    return jnp.minimum(ranks, front).astype(jnp.int32)


def crowding_distance(fitness: ArrayLike, ranks: ArrayLike) -> jax.Array:
    """Says how far the neighbours on its front are from each candidate.

    For each objective the difference between the next larger and the next smaller value on the same front, relative to
    the front's range; summed. Infinite for the first and the last of a front.

    Args:
      fitness: float32 [P, k], finite.
      ranks: int32 [P], the fronts.

    Returns:
      float32 [P].

    Example:
      >>> points = jnp.array([[0.0, 4.0], [1.0, 1.0], [4.0, 0.0]])
      >>> crowding_distance(points, jnp.zeros(3, jnp.int32)).tolist()
      [inf, 2.0, inf]
    """
    points, fronts = jnp.asarray(fitness), jnp.asarray(ranks)
    size = points.shape[0]

    def along(values: jax.Array) -> jax.Array:
        order = jnp.lexsort((values, fronts))
        sorted_values, sorted_fronts = values[order], fronts[order]
        same = sorted_fronts[1:] == sorted_fronts[:-1]
        edge = jnp.zeros(1, bool)
        inner = jnp.concatenate([edge, same]) & jnp.concatenate([same, edge])
        wide = jax.ops.segment_max(values, fronts, size + 1) - jax.ops.segment_min(
            values, fronts, size + 1
        )
        scale = wide[sorted_fronts]
        gap = jnp.roll(sorted_values, -1) - jnp.roll(sorted_values, 1)
        # All values of the front are equal: this objective tells nothing apart.
        relative = jnp.where(scale > 0, gap / jnp.where(scale > 0, scale, 1), 0)
        return jnp.zeros(size).at[order].set(jnp.where(inner, relative, jnp.inf))

    return jnp.sum(jax.vmap(along, in_axes=1)(points), axis=0)
