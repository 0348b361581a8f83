"""Inner products between the models of one tensor, and the unit sphere in coefficients.

A point or a tangent is written as a combination of the models' directions; the cosines between the directions are
then all that lengths, angles and steps along great circles need, so that one pass over the data serves any number of
them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Below it float32 cosines cannot tell a squared length, or a squared sine, from 0.
RESOLUTION = 1e-6


def products(vectors: Sequence[jax.Array], axis: int | None = None) -> jax.Array:
    """Inner products of arrays of one shape, [models, models].

    Args:
      vectors: one array per model.
      axis: None for one product over all elements; else along this axis, which stays with length 1:
        [models, models, ...].
    """
    count = len(vectors)
    keep = axis is not None
    pairs = {
        (i, j): jnp.sum(vectors[i] * vectors[j], axis=axis, keepdims=keep)
        for i in range(count)
        for j in range(i, count)
    }
    rows = [jnp.stack([pairs[min(i, j), max(i, j)] for j in range(count)]) for i in range(count)]
    return jnp.stack(rows)


def lengths(square: jax.Array) -> jax.Array:
    """Square roots whose gradient at 0 is 0."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def cosines(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Norms [models] and cosines [models, models]; a zero vector has cosine 0 with all."""
    norms = lengths(jnp.diagonal(gram))
    present = norms > 0
    safe = jnp.where(present, norms, 1.0)
    cosine = jnp.clip(gram / safe[:, None] / safe[None, :], -1.0, 1.0)
    both = present[:, None] & present[None, :]
    own = jnp.eye(len(norms), dtype=bool)
    return norms, jnp.where(both, jnp.where(own, 1.0, cosine), 0.0)


def form(left: jax.Array, cosine: jax.Array, right: jax.Array) -> jax.Array:
    """The inner product of two combinations of directions, [models] each."""
    return jnp.sum(left[:, None] * cosine * right[None, :])


def tangent(
    point: jax.Array, weight: jax.Array, cosine: jax.Array, *, arc: bool = True
) -> jax.Array:
    """The weighted sum of what leads from a point of the sphere to each direction, [models].

    Args:
      point: coefficients of the point, of length 1.
      weight: one per direction.
      cosine: of the directions.
      arc: each is as long as the angle (the logarithmic map; 0 towards the point itself and its opposite), or else as
        its sine (the chord's projection).
    """
    towards = jnp.clip(jnp.sum(cosine * point[None, :], axis=1), -1.0, 1.0)
    part = weight * _arc_over_sine(towards) if arc else weight
    return part - jnp.sum(part * towards) * point


def moved(point: jax.Array, along: jax.Array, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The point at the end of a tangent (the exponential map), and the tangent's length."""
    square = form(along, cosine, along)
    apart = square > 1e-12
    length = jnp.sqrt(jnp.where(apart, square, 1.0))
    step = jnp.where(apart, jnp.sin(length) / length, 1.0)
    return jnp.where(apart, jnp.cos(length), 1.0) * point + step * along, jnp.where(
        apart, length, 0.0
    )


def _arc_over_sine(cosine: jax.Array) -> jax.Array:
    square = 1.0 - cosine * cosine
    curved = square > RESOLUTION
    sine = jnp.sqrt(jnp.where(curved, square, 1.0))
    straight = jnp.where(cosine > 0, 1.0, 0.0)
    return jnp.where(curved, jnp.arctan2(sine, jnp.where(curved, cosine, 1.0)) / sine, straight)


__all__ = ["RESOLUTION", "cosines", "form", "lengths", "moved", "products", "tangent"]
