"""What a merged model keeps of its sources, and how evenly."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def preservation(scores: ArrayLike, sources: ArrayLike) -> jax.Array:
    """What is kept of each task: P_t = score of the merged model / score of the task's own source.

    Args:
      scores: float [tasks], larger is better.
      sources: float [tasks], positive.

    Returns:
      float32 [tasks]; 1 where the merged model is as good as the source.

    Example:
      >>> preservation(jnp.array([0.45, 0.8]), jnp.array([0.9, 0.8])).tolist()
      [0.5, 1.0]

    Reference:
      AutoMerge, arXiv:2601.22748.
    """
    return jnp.asarray(scores, jnp.float32) / jnp.asarray(sources, jnp.float32)


def discrepancy(preserved: jax.Array) -> jax.Array:
    """How unevenly it is kept: max P - min P, which for two tasks is |P_1 - P_2|.

    Args:
      preserved: float [tasks].

    Example:
      >>> float(discrepancy(jnp.array([0.5, 1.0, 0.75])))
      0.5
    """
    return jnp.max(preserved) - jnp.min(preserved)


def balanced(preserved: jax.Array, balance: float | jax.Array) -> jax.Array:
    """The score of a merge: mean P - balance (max P - min P).

    The mean alone is blind to balance, and so is a mean weighted by distances from the mean where tasks are two.

    Args:
      preserved: float [tasks].
      balance: traced, 0 or more.

    Example:
      >>> float(balanced(jnp.array([0.5, 1.0]), 0.5))
      0.5
    """
    return jnp.mean(preserved) - balance * discrepancy(preserved)
