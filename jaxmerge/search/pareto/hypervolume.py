"""Hypervolume: how much of the space of objectives a set of candidates dominates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def hypervolume(fitness: ArrayLike, reference: ArrayLike) -> jax.Array:
    r"""Measures what a set dominates up to a reference point.

    .. math:: \Lambda \Big( \bigcup_i [f_{i1}, r_1] \times \dots \times [f_{ik}, r_k] \Big)

    Exact for any k up to the rounding of float32: two objectives by one sweep, O(P log P); each further one by slices,
    a factor of P.

    Args:
      fitness: float32 [P, k], k >= 1, less is better. Candidates beyond the reference in any objective, or with NaN,
        add nothing.
      reference: [k].

    Returns:
      float32 [].

    Raises:
      ValueError: other shapes.

    Example:
      >>> float(hypervolume(jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([2.0, 2.0])))
      3.0

    Reference:
      While, Hingston, Barone and Huband, A faster algorithm for calculating hypervolume, IEEE TEC 2006 (by slices).
    """
    points, corner = jnp.asarray(fitness, jnp.float32), jnp.asarray(reference, jnp.float32)
    if points.ndim != 2 or corner.shape != points.shape[1:]:
        raise ValueError(
            f"expected fitness [P, k] and a reference [k], found {list(points.shape)} and "
            f"{list(corner.shape)}"
        )
    inside = jnp.all(points <= corner[None], axis=1)
    return _covered(jnp.where(inside[:, None], corner[None] - points, 0))


def _covered(sizes: jax.Array) -> jax.Array:
    """The measure of a union of boxes [0, s_1] x ... x [0, s_k], of sizes [P, k]."""
    if sizes.shape[1] == 1:
        return jnp.max(sizes[:, 0], initial=0)
    order = jnp.argsort(-sizes[:, -1])
    sizes = sizes[order]
    depth = sizes[:, -1] - jnp.append(sizes[1:, -1], 0)
    if sizes.shape[1] == 2:
        # What the boxes so far cover of the first axis.
        return jnp.sum(depth * jax.lax.cummax(sizes[:, 0]))

    def slice_area(i: jax.Array) -> jax.Array:
        counted = jnp.arange(sizes.shape[0]) <= i
        return _covered(jnp.where(counted[:, None], sizes[:, :-1], 0))

    return jnp.sum(depth * jax.lax.map(slice_area, jnp.arange(sizes.shape[0])))
