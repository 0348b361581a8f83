"""Moments of two models' activations, gathered batch by batch, and the correlations that follow from them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

CLAMP = 1e-7
"""What a denominator is at least: a unit that never changes correlates with nothing."""


class Moments(NamedTuple):
    """What correlations of units need to know of the samples seen so far.

    Attributes:
      samples: float [], how many there were.
      mean_a, mean_b: [..., units], the means.
      square_a, square_b: [..., units], the sums of squared deviations.
      cross: [..., units of a, units of b], the sums of products of deviations.
    """

    samples: jax.Array
    mean_a: jax.Array
    mean_b: jax.Array
    square_a: jax.Array
    square_b: jax.Array
    cross: jax.Array


def moments(a: jax.Array, b: jax.Array) -> Moments:
    """The moments of one batch.

    Args:
      a, b: [..., samples, units] of two models; the same samples.
    """
    mean_a, mean_b = jnp.mean(a, axis=-2), jnp.mean(b, axis=-2)
    a, b = a - mean_a[..., None, :], b - mean_b[..., None, :]
    return Moments(
        jnp.asarray(a.shape[-2], a.dtype),
        mean_a,
        mean_b,
        jnp.sum(a**2, axis=-2),
        jnp.sum(b**2, axis=-2),
        jnp.einsum("...si,...sj->...ij", a, b, precision=jax.lax.Precision.HIGHEST),
    )


def combined(one: Moments, other: Moments) -> Moments:
    """The moments of two batches together.

    Reference:
      Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1982.
    """
    count = one.samples + other.samples
    weight = one.samples * other.samples / count
    gap_a, gap_b = other.mean_a - one.mean_a, other.mean_b - one.mean_b
    return Moments(
        count,
        one.mean_a + gap_a * (other.samples / count),
        one.mean_b + gap_b * (other.samples / count),
        one.square_a + other.square_a + weight * gap_a**2,
        one.square_b + other.square_b + weight * gap_b**2,
        one.cross + other.cross + weight * gap_a[..., :, None] * gap_b[..., None, :],
    )


def correlation(found: Moments) -> jax.Array:
    """Pearson's correlations, [..., units of a, units of b]; 0 for units that never change.

    Example:
      >>> a, b = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[0.0, 5.0], [-2.0, 5.0], [-4.0, 5.0]])
      >>> correlation(moments(a, b)).round(3).tolist()
      [[-1.0, 0.0]]
    """
    norms = jnp.sqrt(found.square_a)[..., :, None] * jnp.sqrt(found.square_b)[..., None, :]
    return found.cross / jnp.maximum(norms, CLAMP)


def covariance(found: Moments) -> jax.Array:
    """Covariances, [..., units of a, units of b].

    Example:
      >>> a = jnp.array([[0.0], [2.0]])
      >>> covariance(moments(a, a)).tolist()
      [[2.0]]
    """
    return found.cross / jnp.maximum(found.samples - 1, 1)
