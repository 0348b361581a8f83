"""NearSwap."""

from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.registry import register


@register
def nearswap() -> MergeMethod:
    r"""NearSwap: moves each entry of the base towards the model by at most t.

    .. math:: \theta = \theta_0 + \mathrm{clip}\!\left(\frac{t}{|d|}, 0, 1\right) d = \theta_0 + \mathrm{clip}(d, -t, t)

    Entries nearer than t are swapped for the model's.

    Returns:
      A `MergeMethod` with the hyperparameter t. It takes a base and one model.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a = {"w": jnp.zeros(3)}, {"w": jnp.array([0.1, -3.0, 0.5])}
      >>> jm.merge("nearswap", [a], base=base, t=0.5)["w"]
      Array([ 0.1, -0.5,  0.5], dtype=float32)

    Reference:
      NearSwap, a community method by alchemonaut, 2024.
    """
    hyperparams = {
        "t": Hyperparameter(
            1e-3, 0.0, float("inf"), "how far an entry moves at most", search=(0.0, 0.01)
        )
    }
    leaf = LeafMethod("nearswap", _move, MappingProxyType(hyperparams), models=(1, 1))
    return from_leaf(leaf, summary="Move towards one model by at most t.")


def _move(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    (delta,), t = chunk.deltas(), values["t"]
    return chunk.with_base(jnp.clip(delta, -t, t))
