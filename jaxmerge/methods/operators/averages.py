"""Averages of parameters."""

import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.registry import register


@register
def linear() -> MergeMethod:
    r"""Weighted average of the parameters.

    .. math:: \theta = \frac{\sum_i w_i \theta_i}{D}, \quad
       D = \textstyle\sum_i w_i \text{ if normalize and } |\sum_i w_i| > 10^{-6} \sum_i |w_i| \text{, else } 1

    Returns:
      A `MergeMethod` with hyperparameters weight [models] and normalize. A base is not used.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.merge("linear", [{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}], weight=[1.0, 3.0])["w"]
      Array([0.75, 0.75], dtype=float32)

    Reference:
      Wortsman et al., Model soups, ICML 2022.
    """
    infinity = float("inf")
    hyperparams = {
        "weight": Hyperparameter(
            1.0, -infinity, infinity, "weight of each model", "model", search=(0.0, 1.0)
        ),
        "normalize": Hyperparameter(
            1.0, 0.0, 1.0, "divide by the sum of the weights", kind="flag", differentiable=False
        ),
    }
    leaf = LeafMethod("linear", _average, MappingProxyType(hyperparams), base="unused")
    return from_leaf(leaf, summary="Weighted average of the parameters.")


def _average(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    weight = values["weight"]
    total = jnp.sum(weight)
    vanishes = jnp.abs(total) <= 1e-6 * jnp.sum(jnp.abs(weight))
    divisor = jnp.where((values["normalize"] > 0.5) & ~vanishes, total, 1.0)
    share = weight / divisor
    return functools.reduce(
        jnp.add, [share[i] * source for i, source in enumerate(chunk.sources())]
    )
