"""The entrywise median of the models."""

import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.registry import register


@register
def median() -> MergeMethod:
    r"""The median of the models, entry by entry: no outlier moves it far.

    .. math:: \theta = \tfrac12 (\theta_{(a)} + \theta_{(b)})

    with the models sorted per entry and (a), (b) the first at which the weights so far reach and exceed half of their
    sum: the middle model, or the mean of the middle two. Sums within 1e-6 of half count as half; weights that are all 0
    count as equal. A base is ignored.

    Returns:
      A `MergeMethod` with the hyperparameter weight [models].

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, b, c = ({"w": jnp.array([x])} for x in (1.0, 2.0, 90.0))
      >>> jm.merge("median", [a, b, c])["w"], jm.merge("median", [a, b])["w"]
      (Array([2.], dtype=float32), Array([1.5], dtype=float32))

    Reference:
      Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018.
    """
    weight = Hyperparameter(
        1.0,
        0.0,
        float("inf"),
        "weight of each model",
        "model",
        differentiable=False,
        search=(0.0, 1.0),
    )
    leaf = LeafMethod("median", _merge, MappingProxyType({"weight": weight}), base="unused")
    return from_leaf(leaf, summary="Entrywise median of the parameters.")


def _merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    sources, weight = chunk.sources(), values["weight"]
    weight = weight / jnp.maximum(jnp.max(weight), 1e-30)
    weight = jnp.where(jnp.max(weight) > 0, weight, 1.0)
    half = jnp.sum(weight) / 2
    reaches = exceeds = jnp.full_like(sources[0], jnp.inf)
    # All pairs are compared: that fuses into one pass over the data, which a sort does not.
    for one in sources:
        below = [jnp.where(other <= one, weight[i], 0.0) for i, other in enumerate(sources)]
        passed = functools.reduce(jnp.add, below)
        reaches = jnp.where(passed >= half * (1 - 1e-6), jnp.minimum(reaches, one), reaches)
        exceeds = jnp.where(passed > half * (1 + 1e-6), jnp.minimum(exceeds, one), exceeds)
    return 0.5 * reaches + 0.5 * exceeds
