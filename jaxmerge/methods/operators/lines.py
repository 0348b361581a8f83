"""LiNeS: task arithmetic whose scale grows with the depth of the layer."""

from types import MappingProxyType

import jax

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.task_vectors import task_arithmetic
from jaxmerge.methods.registry import register


@register
def lines() -> MergeMethod:
    r"""LiNeS: scales the merged task vector linearly in depth, so that shallow layers stay near the base.

    .. math:: \theta^{(l)} = \theta_0^{(l)} + \lambda \left(\alpha + \beta \frac{l}{L - 1}\right)
       \frac{\sum_i w_i d_i^{(l)}}{D}

    in layer l = 0 ... L - 1, with D as in `task_arithmetic`. The depth l / (L - 1) of a tensor is read from its name in
    the checkpoint, see `jaxmerge.tree.depths`: tensors outside of all layers lie at 0 or 1, those of a model of
    one layer at 0; a `TensorLayout` may say otherwise by `depths`. When it merges, the paper sets alpha from norms and
    tunes beta; for one model it takes beta = 1 - alpha, as these defaults do.

    To set the scales by hand, or to scale another method in depth, give that method
    ``scale=jm.tree.per_block(scales, labels)``.

    Returns:
      A `MergeMethod` with hyperparameters weight [models], scale, normalize, alpha, beta. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base = {"layers": [{"w": jnp.zeros(1)} for _ in range(3)]}
      >>> a = {"layers": [{"w": jnp.full(1, 4.0)} for _ in range(3)]}
      >>> merged = jm.merge("lines", [a], base=base, alpha=0.25, beta=0.75)
      >>> [float(layer["w"][0]) for layer in merged["layers"]]
      [1.0, 2.5, 4.0]

    Reference:
      Wang et al., LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging, ICLR 2025.
    """
    infinity = float("inf")
    arithmetic = task_arithmetic().leaf
    assert arithmetic is not None
    hyperparams = {
        **arithmetic.hyperparams,
        "alpha": Hyperparameter(
            0.5, -infinity, infinity, "factor of the first layer", search=(0.0, 1.0)
        ),
        "beta": Hyperparameter(
            0.5, -infinity, infinity, "how much larger that of the last is", search=(0.0, 1.0)
        ),
    }

    def merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
        factor = values["alpha"] + values["beta"] * chunk.depth
        return arithmetic.apply(chunk, {**values, "scale": values["scale"] * factor}, found)

    leaf = LeafMethod("lines", merge, MappingProxyType(hyperparams))
    return from_leaf(leaf, summary="Sum of weighted task vectors, scaled up with depth.")
