"""EMR: one unified task vector, and for each task a mask and a factor."""

import functools
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Sums, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.task_vectors import SCALE
from jaxmerge.methods.registry import register


@register
def emr(*, means: Literal[False, True] = False) -> MergeMethod:
    r"""EMR: elects a sign and a magnitude per entry; masks and rescalers adapt the result to each task.

    .. math:: \theta = \theta_0 + \lambda \, d, \quad d = g \max_{i: d_i g > 0} |d_i|, \quad
       g = \mathrm{sign} \textstyle\sum_i d_i, \quad m_t = [d_t g > 0], \quad
       f_t = \frac{\sum |d_t|}{\sum |m_t \odot d|}

    The sums run over the whole model; f = 1 where the divisor is 0. The sign of 0 is +. Task t's model is
    :math:`\theta_0 + f_t \, m_t \odot (\theta - \theta_0)`, see `jaxmerge.methods.for_task`.

    Args:
      means: the sums that make f are of each tensor's mean in place of its entries, as the published code has it.

    Returns:
      A `MergeMethod` with the hyperparameter scale. It gives (params, `PerTask`). Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([2.0, 2.0])}, {"w": jnp.array([2.0, -6.0])}
      >>> merged, per_task = jm.merge("emr", [a, b], base=base)
      >>> merged["w"], per_task.masks["w"].tolist(), per_task.factors
      (Array([ 2., -6.], dtype=float32), [[True, False], [True, True]], Array([2., 1.], dtype=float32))

    Reference:
      Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, NeurIPS 2024.
    """
    measure = Sums(
        "factors",
        functools.partial(_norms, means),
        lambda sums, values, found: jnp.where(
            sums[1] > 0, sums[0] / jnp.where(sums[1] > 0, sums[1], 1.0), 1.0
        ),
        needs_values=False,
        scope="model",
    )
    leaf = LeafMethod(
        "emr",
        lambda chunk, values, found: chunk.with_base(values["scale"] * _unified(chunk)[0]),
        MappingProxyType({"scale": SCALE}),
        (measure,),
        per_task=lambda chunk, values, found: (_unified(chunk)[1], found["factors"]),
    )
    return from_leaf(leaf, summary="Elect signs and magnitudes; a mask and a factor for each task.")


def _unified(chunk: Chunk) -> tuple[jax.Array, list[jax.Array]]:
    """The unified task vector, and which entries each model agrees with in sign."""
    deltas = chunk.deltas()
    # Behind the barrier the election is held once, not again for each model.
    positive = jax.lax.optimization_barrier(functools.reduce(jnp.add, deltas) >= 0)
    masks = [(delta != 0) & ((delta > 0) == positive) for delta in deltas]
    sizes = [jnp.where(m, jnp.abs(d), 0.0) for m, d in zip(masks, deltas, strict=True)]
    size = functools.reduce(jnp.maximum, sizes)
    return jnp.where(positive, size, -size), masks


def _norms(means: bool, chunk: Chunk, values: Values, found: Found) -> jax.Array:
    """[2, models]: the L1 norms of the task vectors, and of what their masks leave of the unified one."""
    unified, masks = _unified(chunk)
    size = jax.lax.optimization_barrier(jnp.abs(unified))
    whole = [jnp.sum(jnp.abs(delta)) for delta in chunk.deltas()]
    taken = [jnp.sum(jnp.where(mask, size, 0.0)) for mask in masks]
    return jnp.stack([jnp.stack(whole), jnp.stack(taken)]) / (chunk.size if means else 1.0)
