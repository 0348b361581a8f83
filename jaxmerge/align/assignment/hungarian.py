"""Assignment by optax's Hungarian algorithm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from optax.assignment import hungarian_algorithm


def hungarian(similarity: jax.Array) -> jax.Array:
    """int32 [..., n], the best columns of finite [..., n, n] matrices."""
    n = similarity.shape[-1]

    def solve(matrix: jax.Array) -> jax.Array:
        rows, columns = hungarian_algorithm(-matrix)
        return jnp.zeros(n, jnp.int32).at[rows].set(columns.astype(jnp.int32))

    with jax.numpy_rank_promotion("allow"):
        flat = jax.vmap(solve)(similarity.reshape(-1, n, n))
    return flat.reshape(similarity.shape[:-1])
