"""Fisher merging and uncertainty-aware merging: each parameter weighed by how sharply its model needs it."""

import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.extras import Extra
from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Values, widen
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.task_vectors import WEIGHT
from jaxmerge.methods.registry import register

# A divisor that cancels below this share of its terms' magnitudes says nothing.
CANCELLED = 1e-6


@register
def fisher() -> MergeMethod:
    r"""Fisher merging: averages each parameter with the models' Fisher information as weights.

    .. math:: \theta = \frac{\sum_t w_t F_t \theta_t}{\sum_t w_t F_t}, \quad F_t \leftarrow \max(F_t, \text{floor})

    `jaxmerge.statistics` estimates the diagonal F: exactly, by sampling, from labels, or from an optimiser's second
    moments. Where the divisor cancels (weights of mixed signs) the entry is the plain mean.

    Returns:
      A `MergeMethod` with hyperparameters weight [models] and floor. Needs extras={"fisher": [tree per model]}, each
      tree nonnegative and of the model's shapes.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, b = {"w": jnp.array([0.0, 4.0])}, {"w": jnp.array([4.0, 0.0])}
      >>> information = [{"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([3.0, 0.0])}]
      >>> jm.merge("fisher", [a, b], extras={"fisher": information}, floor=0.0)["w"]
      Array([3., 4.], dtype=float32)

    Reference:
      Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022.
    """
    hyperparams = {
        "weight": WEIGHT,
        "floor": Hyperparameter(
            1e-6, 0.0, float("inf"), "least Fisher information of an entry", search=(0.0, 1e-3)
        ),
    }
    extras = {"fisher": Extra("the diagonal Fisher information of each model", "like")}
    leaf = LeafMethod(
        "fisher",
        _fisher,
        MappingProxyType(hyperparams),
        base="unused",
        extras=MappingProxyType(extras),
    )
    return from_leaf(leaf, summary="Average weighed by the Fisher information of each entry.")


@register
def uncertainty() -> MergeMethod:
    r"""Uncertainty-aware merging: preconditions each task vector by its curvature before adding.

    .. math:: \theta = \theta_0 + \frac{\sum_t w_t (H_0 + H_t)(\theta_t - \theta_0)}{H_0 + \sum_t w_t H_t}

    entry by entry, with H_t the curvature of task t's loss at its model (the Fisher information times the number of
    examples, say) and H_0 that of the base, `precision` added. An entry without any curvature stays at the base.

    Returns:
      A `MergeMethod` with hyperparameters weight [models] and precision. Needs a base and extras={"curvature": [tree
      per model]}; "prior": a tree for the base, is zero where it is not given.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, {"w": jnp.full(1, 5.0)}
      >>> curvature = [{"w": jnp.full(1, 3.0)}, {"w": jnp.full(1, 1.0)}]
      >>> jm.merge("uncertainty", [a, b], base=base, extras={"curvature": curvature}, precision=0.0)["w"]
      Array([2.], dtype=float32)

    Reference:
      Daheim et al., Model Merging by Uncertainty-Based Gradient Matching, ICLR 2024.
    """
    hyperparams = {
        "weight": WEIGHT,
        "precision": Hyperparameter(
            1e-6, 0.0, float("inf"), "what is added to the base's curvature", search=(0.0, 1.0)
        ),
    }
    extras = {
        "curvature": Extra("the diagonal curvature of each model's loss", "like"),
        "prior": Extra("the diagonal curvature of the base's loss", "like", "shared", False),
    }
    leaf = LeafMethod(
        "uncertainty", _uncertainty, MappingProxyType(hyperparams), extras=MappingProxyType(extras)
    )
    return from_leaf(leaf, summary="Task vectors preconditioned by the curvature of each entry.")


def _fisher(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    sources = chunk.sources()
    floors = [jnp.maximum(widen(f), values["floor"]) for f in chunk.extras["fisher"]]
    weighed = [values["weight"][t] * f for t, f in enumerate(floors)]
    total = functools.reduce(jnp.add, [w * x for w, x in zip(weighed, sources, strict=True)])
    divisor = functools.reduce(jnp.add, weighed)
    size = functools.reduce(jnp.add, [jnp.abs(w) for w in weighed])
    mean = functools.reduce(jnp.add, sources) / len(sources)
    return _quotient(total, divisor, size, mean)


def _uncertainty(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    prior = values["precision"]
    for array in chunk.extras["prior"]:
        prior = prior + widen(array)
    total = jnp.zeros_like(chunk.sources()[0])
    divisor, size = prior + total, jnp.abs(prior) + total
    for t, (delta, extra) in enumerate(zip(chunk.deltas(), chunk.extras["curvature"], strict=True)):
        curvature, weight = widen(extra), values["weight"][t]
        total = total + weight * (prior + curvature) * delta
        divisor = divisor + weight * curvature
        size = size + jnp.abs(weight * curvature)
    return chunk.with_base(_quotient(total, divisor, size, jnp.zeros_like(total)))


def _quotient(
    total: jax.Array, divisor: jax.Array, size: jax.Array, otherwise: jax.Array
) -> jax.Array:
    """total / divisor, or `otherwise` where the divisor is nothing beside its terms' size."""
    safe = jnp.abs(divisor) > CANCELLED * size
    return jnp.where(safe, total / jnp.where(safe, divisor, 1.0), otherwise)
