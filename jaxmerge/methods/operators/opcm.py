"""OPCM: models merged one after the other, each projected off what is merged already."""

import functools
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Local, Sums, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators import spectra
from jaxmerge.methods.operators.task_vectors import SCALE
from jaxmerge.methods.registry import register


@register
def opcm(*, alpha: float = 0.5, scope: Literal["model", "tensor"] = "model") -> MergeMethod:
    r"""OPCM: adds task vectors one by one, without their parts along the leading directions of the sum so far.

    .. math:: \theta = \theta_0 + \lambda \frac{\mathrm{mean}_t \|d_t\|}{\|S_T\|} S_T, \quad
       S_1 = d_1, \ S_t = S_{t-1} + P(d_t), \quad
       P(d) = d - \sum_{i, j \le r \text{ or } i = j} (u_i^T d v_j) u_i v_j^T

    with :math:`S_{t-1} = U \mathrm{diag}(\sigma) V^T` and r the fewest singular values that hold alpha of their sum: 0
    at alpha = 0. The paper rescales at every step, so that the norm is the mean norm of the task vectors so far; P
    depends on directions alone, so that the last rescaling is all that shows. Vectors of singular values below 1e-6 of
    the largest take nothing away. Tensors that are not matrices are summed unprojected. A sum of 0 gives the base. The
    result depends on the order of the models.

    Args:
      alpha: share of the spectrum that is protected (static: later projections depend on it).
      scope: norms are those of the whole "model" (the paper), or of each "tensor".

    Returns:
      A `MergeMethod` with the hyperparameter scale. Needs a base.

    Raises:
      ValueError: alpha is not in [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros((2, 2))}, {"w": jnp.diag(jnp.array([2.0, 0.0]))}, {"w": jnp.full((2, 2), 1.0)}
      >>> jm.merge("opcm", [a, b], base=base)["w"].round(2)
      Array([[1.51, 0.76],
             [0.76, 0.76]], dtype=float32)

    Reference:
      Tang et al., Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model
      Merging, NeurIPS 2025.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"opcm: alpha must lie in [0, 1], found {alpha}")
    leaf = LeafMethod(
        "opcm",
        _merge,
        MappingProxyType({"scale": SCALE}),
        (
            Local("sequence", functools.partial(_sequence, alpha)),
            Sums(
                "factor",
                lambda chunk, values, found: found["sequence"][1],
                lambda sums, values, found: _factor(sums),
                scope=scope,
            ),
        ),
        cuts="never",
    )
    return from_leaf(leaf, summary="One model after the other, projected off the sum so far.")


def _sequence(alpha: float, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """The sum S_T, and the squared norms [1 + models] of it and of the task vectors."""
    deltas = chunk.deltas()
    if spectra.has_spectrum(chunk):
        stacked = spectra.matrices(chunk, deltas)
        # A loop, not unrolled: on some platforms a decomposition is a large program.
        summed, _ = jax.lax.scan(
            lambda total, delta: (total + _projected(alpha, delta, total), None),
            stacked[0],
            stacked[1:],
        )
        total = chunk.from_matrix(summed)
    else:
        total = functools.reduce(jnp.add, deltas)
    return total, jnp.stack([jnp.sum(array * array) for array in [total, *deltas]])


def _projected(alpha: float, delta: jax.Array, total: jax.Array) -> jax.Array:
    u, s, v = spectra.decompose(total)
    inside = spectra.product(spectra.product(u.T, delta), v.T)
    leading = spectra.fewest(s, alpha)
    removed = (leading[:, None] & leading[None, :]) | jnp.eye(s.size, dtype=bool)
    return delta - spectra.product(spectra.product(u, jnp.where(removed, inside, 0.0)), v)


def _factor(squares: jax.Array) -> jax.Array:
    lengths = jnp.sqrt(squares)
    wanted, found = jnp.mean(lengths[1:]), lengths[0]
    return jnp.where(found > 0, wanted / jnp.where(found > 0, found, 1.0), 0.0)


def _merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    return chunk.with_base(values["scale"] * (found["factor"] * found["sequence"][0]))
