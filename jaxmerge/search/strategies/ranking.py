"""Recombination weights: what each candidate counts, by its rank."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def logarithmic(population: int) -> np.ndarray:
    r"""The weights of CMA-ES before they are normalised.

    .. math:: w'_i = \log \frac{\lambda + 1}{2} - \log i, \quad i = 1, \dots, \lambda

    Args:
      population: lambda.

    Returns:
      float64 [population], falling; positive for the better half, negative for the rest.

    Reference:
      Hansen, The CMA evolution strategy: a tutorial, arXiv:1604.00772, eq. 49.
    """
    return np.log((population + 1) / 2) - np.log(np.arange(1, population + 1))


def elite(population: int) -> np.ndarray:
    """The weights of the better half: `logarithmic`, the rest 0, of sum 1.

    Args:
      population: at least 2.

    Returns:
      float64 [population].
    """
    weights = np.maximum(logarithmic(population), 0)
    return weights / weights.sum()


def by_rank(weights: np.ndarray, fitness: jax.Array) -> jax.Array:
    """Gives every candidate the weight of its rank; candidates of equal fitness share theirs.

    So the order in which the candidates stand does not matter.

    Args:
      weights: [..., population], of the ranks, the best first.
      fitness: float32 [population], less is better.

    Returns:
      float32 [..., population], of the candidates.

    Example:
      >>> by_rank(np.array([0.75, 0.25, 0.0]), jnp.array([2.0, 5.0, 2.0])).tolist()
      [0.5, 0.0, 0.5]
    """
    order = jnp.argsort(fitness)
    ranked = fitness[order]
    new = jnp.concatenate([jnp.zeros(1, bool), ranked[1:] > ranked[:-1]])
    group = jnp.cumsum(new)
    size = fitness.shape[0]
    of_ranks = jnp.moveaxis(jnp.asarray(weights, jnp.float32), -1, 0)
    total = jax.ops.segment_sum(of_ranks, group, size)
    count = jax.ops.segment_sum(jnp.ones(size), group, size)
    shared = total / jnp.maximum(count, 1).reshape(-1, *[1] * (total.ndim - 1))
    given = jnp.zeros_like(of_ranks).at[order].set(shared[group])
    return jnp.moveaxis(given, 0, -1)
