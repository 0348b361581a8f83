"""MaTS: matches the models in the subspaces that their data sees, by conjugate gradients."""

import functools
from collections.abc import Callable
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import lax

from jaxmerge.methods.extras import Extra
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Values, widen
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.task_vectors import WEIGHT
from jaxmerge.methods.registry import register


@register
def mats(*, iterations: int = 100) -> MergeMethod:
    r"""MaTS: solves for the weights whose behaviour on every task's data is that of the task's model.

    .. math:: \sum_t w_t B_t W A_t = \sum_t w_t B_t W_t A_t

    for each linear layer W [outputs, inputs], with A_t the second moments of its inputs and B_t those of the gradients
    at its outputs (the Kronecker factors of the Fisher information; the identity where they are not given). Conjugate
    gradients start at the mean of the models, where parameters without moments stay. Directions that no task's data
    sees keep the mean.

    Args:
      iterations: of conjugate gradients, at most; they stop at a direction without positive curvature, such as weights
        of mixed signs give.

    Returns:
      A `MergeMethod` with hyperparameter weight [models]. Needs extras={"inputs": [{path: `Gram`} per model]}, and may
      use "outputs"; see `jaxmerge.statistics.grams` and `jaxmerge.statistics.kronecker_factors`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, b = {"w": jnp.array([[1.0, 0.0]])}, {"w": jnp.array([[0.0, 1.0]])}
      >>> moments = [{"w": jnp.diag(jnp.array([1.0, 0.0]))}, {"w": jnp.diag(jnp.array([0.0, 4.0]))}]
      >>> jm.merge("mats", [a, b], extras={"inputs": moments})["w"].round(4)
      Array([[1., 1.]], dtype=float32)

    Reference:
      Tam, Bansal and Raffel, Merging by Matching Models in Task Parameter Subspaces, TMLR 2024.
    """
    if iterations < 1:
        raise ValueError(f"mats: iterations must be at least 1, found {iterations}")
    extras = {
        "inputs": Extra("the second moments of each linear layer's inputs", "gram"),
        "outputs": Extra(
            "the second moments of the gradients at each linear layer's outputs",
            "gram",
            required=False,
            side="outputs",
        ),
    }

    def merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
        sources = chunk.sources()
        mean = functools.reduce(jnp.add, sources) / len(sources)
        if not chunk.extras["inputs"]:
            return mean
        inputs = [widen(moment) for moment in chunk.extras["inputs"]]
        outputs = [widen(moment) for moment in chunk.extras["outputs"]]
        start = chunk.as_matrix(mean)
        apart = [chunk.as_matrix(source) - start for source in sources]
        weight = values["weight"]
        right = _system(apart, weight, inputs, outputs)

        def system(matrix: jax.Array) -> jax.Array:
            return _system([matrix] * len(sources), weight, inputs, outputs)

        return chunk.from_matrix(start + _conjugate_gradients(system, right, iterations))

    leaf = LeafMethod(
        "mats",
        merge,
        MappingProxyType({"weight": WEIGHT}),
        base="unused",
        cuts="never",
        extras=MappingProxyType(extras),
    )
    return from_leaf(leaf, summary="Match every model on its own data, by conjugate gradients.")


def _system(
    matrices: list[jax.Array],
    weight: jax.Array,
    inputs: list[jax.Array],
    outputs: list[jax.Array],
) -> jax.Array:
    """sum_t w_t B_t W_t A_t."""
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    terms = []
    for t, matrix in enumerate(matrices):
        seen = product(matrix, inputs[t])
        terms.append(weight[t] * (product(outputs[t], seen) if outputs else seen))
    return functools.reduce(jnp.add, terms)


def _conjugate_gradients(
    system: Callable[[jax.Array], jax.Array], right: jax.Array, iterations: int
) -> jax.Array:
    """Solves system(x) = right from 0; what has converged, or curves the wrong way, stands still."""
    # At size 1 squares neither overflow nor vanish.
    size = jnp.max(jnp.abs(right))
    residual = right / jnp.where(size > 0, size, 1.0)
    least = 1e-14 * jnp.sum(residual * residual)

    def step(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, residual, direction, energy = carry
        image = system(direction)
        curvature = jnp.sum(direction * image)
        goes_on = (energy > least) & (curvature > 0)
        length = jnp.where(goes_on, energy / jnp.where(goes_on, curvature, 1.0), 0.0)
        x = x + length * direction
        rest = residual - length * image
        found = jnp.sum(rest * rest)
        grown = jnp.where(goes_on, found / jnp.where(goes_on, energy, 1.0), 0.0)
        return (
            x,
            jnp.where(goes_on, rest, residual),
            jnp.where(goes_on, rest + grown * direction, direction),
            jnp.where(goes_on, found, energy),
        )

    begin = (jnp.zeros_like(right), residual, residual, jnp.sum(residual * residual))
    return lax.fori_loop(0, iterations, step, begin)[0] * size
