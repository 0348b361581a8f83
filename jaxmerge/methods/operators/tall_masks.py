"""TALL masks: which entries of a sum of task vectors belong to which task, and which are everybody's."""

import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.task_vectors import SCALE, WEIGHT
from jaxmerge.methods.registry import register

THRESHOLD = Hyperparameter(
    0.4,
    0.0,
    float("inf"),
    "how much of what the others add an entry must exceed to be its task's own",
    "model",
    differentiable=False,
    search=(0.2, 0.6),
)


@register
def tall_masks() -> MergeMethod:
    r"""TALL masks: task arithmetic, and for each task a mask of the entries that are its own.

    .. math:: \theta = \theta_0 + \lambda d, \quad d = \textstyle\sum_i w_i d_i, \quad
       m_t = [\, |d_t| > \gamma_t |d - d_t| \,]

    With gamma the threshold. Task t's model is :math:`\theta_0 + m_t \odot (\theta - \theta_0)`, see
    `jaxmerge.methods.for_task`; all factors are 1. An entry that model t shares with the base is not in its mask.

    Returns:
      A `MergeMethod` with hyperparameters threshold and weight [models], scale. It gives (params, `PerTask`). Needs a
      base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([2.0, 0.5])}, {"w": jnp.array([1.0, 4.0])}
      >>> merged, per_task = jm.merge("tall_masks", [a, b], base=base)
      >>> merged["w"], jm.methods.for_task(merged, base, per_task, 0)["w"]
      (Array([3. , 4.5], dtype=float32), Array([3., 0.], dtype=float32))

    Reference:
      Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024.
    """
    leaf = LeafMethod(
        "tall_masks",
        lambda chunk, values, found: chunk.with_base(values["scale"] * _sum(chunk, values)),
        MappingProxyType({"threshold": THRESHOLD, "weight": WEIGHT, "scale": SCALE}),
        per_task=_per_task,
    )
    return from_leaf(leaf, summary="Sum of task vectors, with a mask of its own for each task.")


@register
def consensus() -> MergeMethod:
    r"""Consensus merging: keeps the entries of the summed task vector that several tasks call their own.

    .. math:: \theta = \theta_0 + \lambda \, d \, [\, \textstyle\sum_t m_t \ge k \,], \quad d = \sum_i w_i d_i, \quad
       m_t = [\, |d_t| > \gamma_t |d - d_t| \,]

    With gamma the threshold and k the minimum: 2 removes what one task alone uses, 1 what none does, 0 nothing. Fewer
    than k models give the base.

    Returns:
      A `MergeMethod` with hyperparameters threshold and weight [models], minimum, scale. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([2.0, 0.5])}, {"w": jnp.array([1.0, 4.0])}
      >>> jm.merge("consensus", [a, b], base=base)["w"]
      Array([3., 0.], dtype=float32)

    Reference:
      Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024.
    """
    minimum = Hyperparameter(
        2.0,
        0.0,
        1e9,
        "how many tasks must share an entry",
        kind="index",
        differentiable=False,
        search=(1.0, 3.0),
    )
    hyperparams = {"threshold": THRESHOLD, "minimum": minimum, "weight": WEIGHT, "scale": SCALE}
    leaf = LeafMethod("consensus", _agreed, MappingProxyType(hyperparams))
    return from_leaf(leaf, summary="Sum of task vectors where enough tasks call an entry theirs.")


def _agreed(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    total = _sum(chunk, values)
    masks = _masks(chunk, values, total)
    votes = functools.reduce(jnp.add, [mask.astype(jnp.int32) for mask in masks])
    kept = jnp.where(votes >= values["minimum"], total, 0.0)
    return chunk.with_base(values["scale"] * kept)


def _per_task(chunk: Chunk, values: Values, found: Found) -> tuple[list[jax.Array], jax.Array]:
    # Behind the barrier the sum is computed once, not again for each model.
    total = jax.lax.optimization_barrier(_sum(chunk, values))
    return _masks(chunk, values, total), jnp.ones(len(chunk.models))


def _masks(chunk: Chunk, values: Values, total: jax.Array) -> list[jax.Array]:
    threshold = values["threshold"]
    return [
        jnp.abs(delta) > threshold[i] * jnp.abs(total - delta)
        for i, delta in enumerate(chunk.deltas())
    ]


def _sum(chunk: Chunk, values: Values) -> jax.Array:
    weight = values["weight"]
    return functools.reduce(jnp.add, [weight[i] * delta for i, delta in enumerate(chunk.deltas())])
