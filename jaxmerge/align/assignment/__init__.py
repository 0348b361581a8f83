"""Linear assignment: which unit of one model stands for which unit of another."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxmerge.align.assignment.host import on_host
from jaxmerge.align.assignment.hungarian import hungarian
from jaxmerge.align.assignment.paths import paths
from jaxmerge.align.assignment.sinkhorn import sinkhorn

__all__ = ["Solver", "assign", "sinkhorn"]

Solver = Literal["auto", "scipy", "hungarian", "paths"]


def assign(similarity: ArrayLike, solver: Solver = "auto") -> jax.Array:
    r"""Assigns columns to rows so that the sum of similarities is largest.

    .. math:: \max_\pi \sum_i S_{i \pi(i)}

    Args:
      similarity: [..., n, n] floats, finite.
      solver: "scipy" solves on the host, matrix by matrix, through a callback; "hungarian" is optax's solver (slow
        where many rows are equal, and in a batch as slow as its slowest matrix); "paths" is our own, which stays in the
        program, takes many steps at once and does not mind ties. "auto" is "scipy" where the program runs on a CPU
        and "paths" elsewhere.

    Returns:
      int32 [..., n], the column of each row. "scipy" and "hungarian" are exact for the given numbers, "paths" for the
      numbers rounded to 24 bits of their range, which is what a float32 holds. Inside a program a matrix that is not
      finite gives -1 everywhere.

    Raises:
      ValueError: the last two axes differ, or (where the values are at hand) an entry is NaN or infinite; the message
        says where.

    Example:
      >>> assign(np.array([[0.1, 0.9], [0.8, 0.7]]))
      Array([1, 0], dtype=int32)

    Reference:
      Crouse, On implementing 2D rectangular assignment algorithms, IEEE TAES 2016 (SciPy's). Hopcroft and Karp, An
      n^{5/2} algorithm for maximum matchings in bipartite graphs, SIAM J. Comput. 1973 (many paths at once).
    """
    matrices = jnp.asarray(similarity)
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(
            f"a similarity of shape [..., n, n] was expected, found {list(matrices.shape)}"
        )
    if not jnp.issubdtype(matrices.dtype, jnp.floating):
        matrices = matrices.astype(jnp.float32)
    if not isinstance(matrices, jax.core.Tracer):
        _check_finite(np.asarray(matrices))
    if solver not in ("auto", "scipy", "hungarian", "paths"):
        raise ValueError(
            f"unknown solver {solver!r}; there are 'auto', 'scipy', 'hungarian', 'paths'"
        )
    n = matrices.shape[-1]
    if n == 0 or math.prod(matrices.shape[:-2]) == 0:
        return jnp.zeros(matrices.shape[:-1], jnp.int32)
    finite = jnp.all(jnp.isfinite(matrices), axis=(-1, -2), keepdims=True)
    usable = jnp.where(finite, matrices, 0)
    if solver == "auto":
        columns = jax.lax.platform_dependent(usable, cpu=on_host, default=paths)
    else:
        columns = {"scipy": on_host, "hungarian": hungarian, "paths": paths}[solver](usable)
    return jnp.where(finite[..., 0], columns, -1)


def _check_finite(matrices: np.ndarray) -> None:
    bad = ~np.isfinite(matrices.astype(np.float64))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"the similarity at {list(place)} is {float(matrices[place])}"
            f" ({int(bad.sum())} entries are not finite)"
        )
