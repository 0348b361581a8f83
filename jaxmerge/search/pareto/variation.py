"""Crossover and mutation on genomes, bounded to [0, 1]."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def simulated_binary_crossover(
    key: jax.Array, first: jax.Array, second: jax.Array, index: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Draws two children around two parents; which child is near which parent is drawn for each coordinate.

    Args:
      key: one key.
      first, second: the parents, float32 [..., n] in [0, 1].
      index: eta; the larger, the nearer to the parents.

    Returns:
      The children, [..., n] each, in [0, 1]. Coordinates in which the parents are equal stay.

    Reference:
      Deb and Agrawal, Simulated binary crossover for continuous search space, Complex Systems 1995; its bounded form is
      that of NSGA-II.
    """
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    apart = high - low
    gap = jnp.maximum(apart, 1e-7)
    for_spread, for_swap = jax.random.split(key)
    u = jax.random.uniform(for_spread, first.shape)
    power = 1 / (jnp.asarray(index, jnp.float32) + 1)

    def spread(room: jax.Array) -> jax.Array:
        alpha = 2 - (1 + 2 * room / gap) ** (-1 / power)
        inner = (u * alpha) ** power
        return jnp.where(u * alpha <= 1, inner, (1 / jnp.maximum(2 - u * alpha, 1e-7)) ** power)

    below = (low + high - spread(low) * apart) / 2
    above = (low + high + spread(1 - high) * apart) / 2
    swapped = jax.random.bernoulli(for_swap, 0.5, first.shape)
    children = jnp.where(swapped, above, below), jnp.where(swapped, below, above)
    return jnp.clip(children[0], 0, 1), jnp.clip(children[1], 0, 1)


def polynomial_mutation(
    key: jax.Array, genome: jax.Array, index: jax.typing.ArrayLike
) -> jax.Array:
    """Moves every coordinate a little, seldom far.

    Args:
      key: one key.
      genome: float32 [..., n] in [0, 1].
      index: eta; the larger, the smaller the moves.

    Returns:
      [..., n] in [0, 1].

    Reference:
      Deb and Goyal, A combined genetic adaptive search (GeneAS) for engineering design, 1996; its bounded form is that
      of NSGA-II.
    """
    u = jax.random.uniform(key, genome.shape)
    power = jnp.asarray(index, jnp.float32) + 1
    down = u < 0.5
    share = jnp.where(down, 2 * u, 2 - 2 * u)
    room = jnp.where(down, 1 - genome, genome)
    moved = 1 - (share + (1 - share) * room**power) ** (1 / power)
    return jnp.clip(jnp.where(down, genome - moved, genome + moved), 0, 1)
