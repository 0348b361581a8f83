"""Soft assignment: the entropic optimum, differentiable."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def sinkhorn(
    similarity: ArrayLike,
    temperature: ArrayLike = 0.1,
    *,
    rows: ArrayLike | None = None,
    columns: ArrayLike | None = None,
    iterations: int = 100,
) -> jax.Array:
    r"""Finds the transport plan of largest similarity and entropy.

    .. math:: \max_P \langle P, S \rangle + \tau H(P), \quad P 1 = r, \; P^T 1 = c

    by alternate scaling of rows and columns in the logarithm. As :math:`\tau \to 0` this is the assignment.

    Args:
      similarity: [..., n, m] floats.
      temperature: tau > 0, scalar; traced. Small values need more iterations.
      rows: r, [..., n] positive masses; 1 / n each by default.
      columns: c, [..., m], of the same sum; 1 / m each by default.
      iterations: static number of scalings.

    Returns:
      P, [..., n, m]. The columns' sums are exact, those of the rows as far as the iterations go.

    Example:
      >>> plan = sinkhorn(jnp.array([[0.0, 1.0], [1.0, 0.0]]), 0.01)
      >>> jnp.round(plan, 3).tolist()
      [[0.0, 0.5], [0.5, 0.0]]

    Reference:
      Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, NeurIPS 2013.
    """
    scores = jnp.asarray(similarity) / jnp.asarray(temperature, jnp.float32)
    n, m = scores.shape[-2:]
    r = jnp.full(scores.shape[:-1], 1.0 / n) if rows is None else jnp.asarray(rows)
    shape = (*scores.shape[:-2], m)
    c = jnp.full(shape, 1.0 / m) if columns is None else jnp.asarray(columns)

    def scale(
        state: tuple[jax.Array, jax.Array], _: None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        g = state[1]
        f = jnp.log(r) - jax.nn.logsumexp(scores + g[..., None, :], axis=-1)
        g = jnp.log(c) - jax.nn.logsumexp(scores + f[..., :, None], axis=-2)
        return (f, g), None

    start = (jnp.zeros(scores.shape[:-1], scores.dtype), jnp.zeros(shape, scores.dtype))
    (f, g), _ = jax.lax.scan(scale, start, None, length=iterations)
    return jnp.exp(scores + f[..., :, None] + g[..., None, :])
