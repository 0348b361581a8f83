"""MetaGPT: task arithmetic whose weights come from the task vectors' norms."""

import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Sums, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.task_vectors import SCALE
from jaxmerge.methods.registry import register


@register
def metagpt() -> MergeMethod:
    r"""MetaGPT: weighs each task vector by its share of the squared norms, which needs neither data nor a search.

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i d_i, \quad w_i = \frac{\|d_i\|^2}{\sum_j \|d_j\|^2}

    The norms are those of the whole model. Where no model differs from the base, the result is the base.

    Returns:
      A `MergeMethod` with the hyperparameter scale. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(4)}, {"w": jnp.array([1.0, 1, 1, 0])}, {"w": jnp.array([0, 0, 0, 1.0])}
      >>> jm.merge("metagpt", [a, b], base=base)["w"]
      Array([0.75, 0.75, 0.75, 0.25], dtype=float32)

    Reference:
      Zhou et al., MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic, EMNLP 2024.
    """
    measure = Sums("share", _energies, _shares, needs_values=False, scope="model")
    leaf = LeafMethod("metagpt", _merge, MappingProxyType({"scale": SCALE}), (measure,))
    return from_leaf(leaf, summary="Sum of task vectors, each by its share of the squared norms.")


def _energies(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    """[models]: the squared norms."""
    return jnp.stack([jnp.sum(delta * delta) for delta in chunk.deltas()])


def _shares(energy: jax.Array, values: Values, found: Found) -> jax.Array:
    total = jnp.sum(energy)
    return energy / jnp.where(total > 0, total, 1.0)


def _merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    share = found["share"]
    parts = [share[i] * delta for i, delta in enumerate(chunk.deltas())]
    return chunk.with_base(values["scale"] * functools.reduce(jnp.add, parts))
