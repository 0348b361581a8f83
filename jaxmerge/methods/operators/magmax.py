"""MagMax: per entry the largest change."""

import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.task_vectors import SCALE
from jaxmerge.methods.registry import register


@register
def magmax() -> MergeMethod:
    r"""MagMax: takes each entry from the model that changed it most.

    .. math:: \theta = \theta_0 + \lambda d_{i^*}, \quad i^* = \arg\max_i |d_i| \text{ per entry}

    Of equal magnitudes the first model's counts.

    Returns:
      A `MergeMethod` with the hyperparameter scale. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, -3.0])}, {"w": jnp.array([-2.0, 1.0])}
      >>> jm.merge("magmax", [a, b], base=base)["w"]
      Array([-2., -3.], dtype=float32)

    Reference:
      Marczak et al., MagMax: Leveraging Model Merging for Seamless Continual Learning, ECCV 2024.
    """
    leaf = LeafMethod("magmax", _merge, MappingProxyType({"scale": SCALE}))
    return from_leaf(leaf, summary="Per entry the largest change that a model made.")


def _merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    return chunk.with_base(values["scale"] * functools.reduce(_larger, chunk.deltas()))


def _larger(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(other) > jnp.abs(one), other, one)
