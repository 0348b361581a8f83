"""STAR: spectral truncation of each task vector, with its nuclear norm restored."""

import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Local, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators import spectra
from jaxmerge.methods.operators.task_vectors import SCALE, WEIGHT
from jaxmerge.methods.registry import register


@register
def star() -> MergeMethod:
    r"""STAR: drops each task vector's small singular values, scales the others up, averages.

    .. math:: \theta = \theta_0 + \lambda \frac{1}{D} \sum_t w_t \frac{\|\Sigma_t\|_*}{\|\Sigma_t^{(r_t)}\|_*}
       U_t \Sigma_t^{(r_t)} V_t^T, \quad
       r_t = \min \Big\{ r \ge 1 : \sum_{i \le r} \sigma_{t,i} \ge \eta \sum_i \sigma_{t,i} \Big\}

    D is the sum of the weights with `normalize`, where it does not vanish beside their magnitudes, else 1. Tensors that
    are not matrices are averaged as they are.

    Returns:
      A `MergeMethod` with hyperparameters eta, weight [models], scale, normalize. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a = {"w": jnp.zeros((2, 2))}, {"w": jnp.diag(jnp.array([3.0, 1.0]))}
      >>> jnp.abs(jm.merge("star", [a], base=base, eta=0.5)["w"]).round(2)
      Array([[4., 0.],
             [0., 0.]], dtype=float32)

    Reference:
      Lee et al., STAR: Spectral Truncation and Rescale for Model Merging, NAACL 2025.
    """
    hyperparams = {
        "eta": Hyperparameter(
            0.4,
            0.0,
            1.0,
            "share of the sum of the singular values that is kept",
            differentiable=False,
        ),
        "weight": WEIGHT,
        "scale": SCALE,
        "normalize": Hyperparameter(
            1.0, 0.0, 1.0, "divide by the sum of the weights", kind="flag", differentiable=False
        ),
    }
    leaf = LeafMethod(
        "star",
        _merge,
        MappingProxyType(hyperparams),
        (Local("spectrum", _spectrum),),
        cuts="never",
    )
    return from_leaf(leaf, summary="Truncate each spectrum, restore its sum, average.")


def _spectrum(chunk: Chunk) -> tuple[spectra.Triplets, jax.Array] | None:
    """The models' triplets in one row, and their singular values [models, k]."""
    if not spectra.has_spectrum(chunk):
        return None
    parts = spectra.decompose(spectra.matrices(chunk, chunk.deltas()))
    return parts.side_by_side(), parts.s


def _merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    weight = values["weight"]
    total = jnp.sum(weight)
    vanishes = jnp.abs(total) <= 1e-6 * jnp.sum(jnp.abs(weight))
    share = weight / jnp.where((values["normalize"] > 0.5) & ~vanishes, total, 1.0)
    if found["spectrum"] is None:
        parts = [share[i] * delta for i, delta in enumerate(chunk.deltas())]
        delta = functools.reduce(jnp.add, parts)
    else:
        (u, _, v), s = found["spectrum"]
        kept = spectra.fewest(s, values["eta"]).at[:, 0].set(True)
        left = jnp.where(kept, s, 0.0)
        mass = jnp.sum(left, axis=1)
        factor = jnp.where(mass > 0, jnp.sum(s, axis=1) / jnp.where(mass > 0, mass, 1.0), 1.0)
        spectrum = (share * factor)[:, None] * left
        delta = chunk.from_matrix(spectra.product(u * spectrum.reshape(1, -1), v))
    return chunk.with_base(values["scale"] * delta)
