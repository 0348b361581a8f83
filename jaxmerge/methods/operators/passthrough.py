"""One model, unmerged."""

from types import MappingProxyType

import jax

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.registry import register


@register
def passthrough() -> MergeMethod:
    r"""One model as it is, or scaled.

    .. math:: \theta = s \, \theta_1

    Returns:
      A `MergeMethod` with the hyperparameter scale [models]. It takes one model; a base is not used.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.merge("passthrough", [{"w": jnp.ones(2)}], scale=0.5)["w"]
      Array([0.5, 0.5], dtype=float32)
    """
    infinity = float("inf")
    scale = Hyperparameter(
        1.0, -infinity, infinity, "scale of the model", "model", search=(0.0, 2.0)
    )
    leaf = LeafMethod(
        "passthrough",
        _scaled,
        MappingProxyType({"scale": scale}),
        base="unused",
        models=(1, 1),
    )
    return from_leaf(leaf, summary="One model as it is, or scaled.")


def _scaled(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    (source,) = chunk.sources()
    return values["scale"][0] * source
