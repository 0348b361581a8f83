"""NegMerge: what all models agree on in sign."""

import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.task_vectors import SCALE
from jaxmerge.methods.registry import register


@register
def negmerge() -> MergeMethod:
    r"""NegMerge: averages the entries of the task vectors whose sign all models share, and leaves out the others.

    .. math:: \theta = \theta_0 + \lambda \bar d \, [\, d_i > 0 \ \forall i \ \text{ or } \ d_i < 0 \ \forall i \,],
       \quad \bar d = \tfrac{1}{N} \textstyle\sum_i d_i

    To forget, merge models that were tuned on what is to be forgotten, and take a negative scale.

    Returns:
      A `MergeMethod` with the hyperparameter scale. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -2.0])}
      >>> jm.merge("negmerge", [a, b], base=base, scale=-0.5)["w"]
      Array([-1.,  0.], dtype=float32)

    Reference:
      Kim et al., NegMerge: Consensual Weight Negation for Strong Machine Unlearning, 2024.
    """
    leaf = LeafMethod("negmerge", _merge, MappingProxyType({"scale": SCALE}))
    return from_leaf(leaf, summary="Mean of the changes whose sign all models share.")


def _merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    deltas = chunk.deltas()
    lowest, highest = functools.reduce(jnp.minimum, deltas), functools.reduce(jnp.maximum, deltas)
    mean = functools.reduce(jnp.add, deltas) / len(deltas)
    agreed = jnp.where((lowest > 0) | (highest < 0), mean, 0.0)
    return chunk.with_base(values["scale"] * agreed)
