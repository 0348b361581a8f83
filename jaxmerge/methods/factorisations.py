"""Matrix factorisations, one matrix after the other.

A batched LAPACK call of JAX on the CPU shares its matrices out to the thread pool that it runs in, and waits there. Two
of them at once on a pool of two threads wait for each other for ever. So a batch is a loop here, on every platform.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap


@jax.custom_jvp
def svd(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The thin singular value decomposition of [..., m, n]: u [..., m, k], s [..., k], v [..., k, n].

    Example:
      >>> u, s, v = svd(jnp.array([[[3.0, 0.0], [0.0, 4.0]]]))
      >>> s
      Array([[4., 3.]], dtype=float32)
    """
    return _over_leading(_svd, a)


def cholesky(a: jax.Array) -> jax.Array:
    """The lower Cholesky factor of [..., n, n], NaN where a matrix is not positive definite; not differentiable."""
    return _over_leading(_cholesky, jax.lax.stop_gradient(a))


@sequential_vmap
def cholesky_solve(factor: jax.Array, right: jax.Array) -> jax.Array:
    """Solves L L^T x = right for L [n, n] and right [n, k]; not differentiable."""
    return jax.scipy.linalg.cho_solve((factor, True), right)


@svd.defjvp
def _svd_tangents(primals: Any, tangents: Any) -> Any:
    def plain(a: jax.Array) -> Any:
        return tuple(jnp.linalg.svd(a, full_matrices=False))

    return jax.jvp(plain, primals, tangents)


@sequential_vmap
def _svd(a: jax.Array) -> Any:
    return tuple(jnp.linalg.svd(a, full_matrices=False))


@sequential_vmap
def _cholesky(a: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(a, symmetrize_input=False)


def _over_leading(one: Any, a: jax.Array) -> Any:
    for _ in range(a.ndim - 2):
        one = jax.vmap(one)
    return one(a)
