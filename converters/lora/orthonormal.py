"""Orthonormal columns of a tall matrix, mostly by products, which every device does fast."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from jaxmerge.methods.factorisations import cholesky

product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# Added to the Gram matrix relative to its largest entry, so that rounding leaves it positive: a pass then shrinks the
# condition number by the root of it. The last pass is exact.
_SHIFTS = (1e-5, 1e-5, 0.0)
# Columns further from orthonormal than this are computed by Householder's reflections instead.
_TOLERANCE = 1e-4


def orthonormal(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Factors y = q r, q with orthonormal columns, by shifted Cholesky QR.

    .. math:: L L^T = Y^T Y + \sigma I, \quad Q = Y L^{-T}, \quad R = L^T, \quad \text{repeated on } Q

    Where y is too close to a lower rank for that, q and r come from LAPACK's QR.

    Args:
      y: float [m, k], m >= k.

    Returns:
      q [m, k], and r [k, k], which is upper triangular.

    Example:
      >>> y = jnp.array([[3.0, 1.0], [4.0, 2.0], [0.0, 2.0]])
      >>> q, r = orthonormal(y)
      >>> bool(jnp.allclose(q.T @ q, jnp.eye(2), atol=1e-5)), bool(jnp.allclose(q @ r, y, atol=1e-5))
      (True, True)

    Reference:
      Fukaya et al., Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices, SIAM Journal on
      Scientific Computing 42, 2020.
    """
    identity = jnp.eye(y.shape[1], dtype=y.dtype)

    def one_pass(factors: tuple[jax.Array, jax.Array], shift: jax.Array) -> Any:
        q, r = factors
        gram = product(q.T, q)
        lower = cholesky(gram + shift * jnp.max(jnp.diag(gram)) * identity)
        q = product(q, solve_triangular(lower, identity, lower=True).T)
        return (q, product(lower.T, r)), None

    (q, r), _ = jax.lax.scan(one_pass, (y, identity), jnp.asarray(_SHIFTS, y.dtype))
    # NaN, of a matrix that was not positive definite, is not below the tolerance.
    good = jnp.max(jnp.abs(product(q.T, q) - identity)) < _TOLERANCE
    return jax.lax.cond(good, lambda: (q, r), lambda: tuple(jnp.linalg.qr(y)))
