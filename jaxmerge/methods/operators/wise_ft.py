"""WiSE-FT: between the base and one fine-tuned model."""

from types import MappingProxyType

import jax

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Values, widen
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.registry import register


@register
def wise_ft() -> MergeMethod:
    r"""WiSE-FT: interpolates between the base and one fine-tuned model, for robustness to other data.

    .. math:: \theta = (1 - t)\, \theta_0 + t\, \theta_1

    Both ends are exact. t may lie outside [0, 1].

    Returns:
      A `MergeMethod` with the hyperparameter t. It takes a base and one model.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a = {"w": jnp.zeros(2)}, {"w": jnp.array([4.0, -2.0])}
      >>> jm.merge("wise_ft", [a], base=base, t=0.25)["w"]
      Array([ 1. , -0.5], dtype=float32)

    Reference:
      Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022.
    """
    infinity = float("inf")
    t = Hyperparameter(
        0.5, -infinity, infinity, "place on the line: 0 base, 1 model", search=(0.0, 1.0)
    )
    leaf = LeafMethod("wise_ft", _between, MappingProxyType({"t": t}), models=(1, 1))
    return from_leaf(leaf, summary="Between the base and one model.")


def _between(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    assert chunk.base is not None
    (model,), t = chunk.sources(), values["t"]
    return (1.0 - t) * widen(chunk.base) + t * model
