"""RegMean: the weights whose outputs are nearest to every model's on its own inputs."""

import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.extras import Extra
from jaxmerge.methods.factorisations import cholesky, cholesky_solve
from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Values, widen
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.task_vectors import WEIGHT
from jaxmerge.methods.registry import register

# Gram matrices of mixed signs that leave less than this share of their sum of magnitudes have cancelled.
RESOLUTION = 1e-3


@register
def regmean() -> MergeMethod:
    r"""RegMean: for each linear layer, the weights whose outputs are nearest to every model's on its own inputs.

    .. math:: W = \Big(\sum_t w_t W_t G_t' + r \bar W\Big) \Big(\sum_t w_t G_t' + r I\Big)^{-1}, \quad
       G_t' = \alpha G_t + (1 - \alpha) \operatorname{diag}(G_t)

    with G_t = X_t^T X_t / n over what goes into the layer, and r = `ridge` times the mean diagonal of the sum.
    Parameters without a Gram matrix are averaged; see `combine` for degenerate sums. `jaxmerge.statistics.grams`
    captures the Gram matrices from a model's program, `jaxmerge.learning.regmean_plus_plus` from the merged prefix.

    Returns:
      A `MergeMethod` with hyperparameters weight [models], alpha, ridge. Needs extras={"grams": [{path: `Gram`} per
      model]}.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, b = {"w": jnp.array([[1.0, 5.0]])}, {"w": jnp.array([[7.0, 2.0]])}
      >>> grams = [{"w": jnp.diag(jnp.array([1.0, 0.0]))}, {"w": jnp.diag(jnp.array([0.0, 1.0]))}]
      >>> jm.merge("regmean", [a, b], extras={"grams": grams})["w"].round(3)
      Array([[1., 2.]], dtype=float32)

    Reference:
      Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, ICLR 2023.
    """
    hyperparams = {
        "weight": WEIGHT,
        "alpha": Hyperparameter(
            0.9, 0.0, 1.0, "how much of the Gram matrices' off-diagonals counts"
        ),
        "ridge": Hyperparameter(
            1e-6,
            0.0,
            float("inf"),
            "pull towards the mean, relative to the inputs' mean square",
            search=(0.0, 0.1),
        ),
    }
    extras = {"grams": Extra("the Gram matrices of each linear layer's inputs", "gram")}
    leaf = LeafMethod(
        "regmean",
        _merge,
        MappingProxyType(hyperparams),
        base="unused",
        cuts="never",
        extras=MappingProxyType(extras),
    )
    return from_leaf(leaf, summary="Least squares on every model's own inputs, layer by layer.")


def combine(
    weights: jax.Array,
    grams: jax.Array,
    weight: jax.Array | float = 1.0,
    alpha: jax.Array | float = 0.9,
    ridge: jax.Array | float = 1e-6,
) -> jax.Array:
    r"""Merges one linear layer by least squares on the models' inputs.

    .. math:: W = \bar W + \Big(\sum_t w_t (W_t - \bar W) G_t'\Big) \Big(\sum_t w_t G_t' + r I\Big)^{-1}, \quad
       G_t' = \alpha G_t + (1 - \alpha) \operatorname{diag}(G_t)

    where r is `ridge` times the mean of the diagonal of :math:`\sum_t w_t G_t'`: directions that no input has keep the
    mean :math:`\bar W`. Where the sum is not positive (weights that cancel, negative ones that outweigh the others, no
    inputs at all) the result is the mean, with zero gradients. Arithmetic in float32 (float64 where the weights are).

    Args:
      weights: [models, out, in].
      grams: [models, in, in], each X^T X / n of that model's inputs.
      weight: [models] or scalar.
      alpha: scalar in [0, 1], kept below 1 by in * 1.2e-7 so that the sum can be factored in float32 even if there are
        fewer inputs than dimensions.
      ridge: scalar, at least 0.

    Returns:
      [out, in].

    Example:
      >>> import jax.numpy as jnp
      >>> weights = jnp.array([[[1.0, 5.0]], [[7.0, 2.0]]])
      >>> seen = jnp.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])  # each model sees one input only
      >>> print(combine(weights, seen).round(2))
      [[1. 2.]]
    """
    wide = jnp.promote_types(weights.dtype, jnp.float32)
    models, _, size = weights.shape
    weights, grams = weights.astype(wide), grams.astype(wide)
    weight = jnp.broadcast_to(jnp.asarray(weight, wide), (models,))
    alpha = jnp.minimum(jnp.asarray(alpha, wide), 1 - size * jnp.finfo(wide).eps)
    identity = jnp.eye(size, dtype=wide)
    shrunk = grams * (alpha + (1 - alpha) * identity)[None]
    left = jnp.tensordot(weight, shrunk, 1, precision=jax.lax.Precision.HIGHEST)
    level = jnp.trace(left) / max(size, 1)
    magnitude = jnp.sum(jnp.abs(weight) * jnp.trace(shrunk, axis1=1, axis2=2)) / max(size, 1)
    positive = level > RESOLUTION * magnitude
    left = jnp.where(positive, left + ridge * level * identity, identity)
    mean = jnp.mean(weights, axis=0)
    right = jnp.einsum(
        "t,toi,tij->oj",
        weight,
        weights - mean[None],
        shrunk,
        precision=jax.lax.Precision.HIGHEST,
    )
    step = _solve(left, jnp.where(positive, right, 0.0).T).T
    return mean + step


def _merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    sources = chunk.sources()
    if not chunk.extras["grams"]:
        return functools.reduce(jnp.add, sources) / len(sources)
    weights = jnp.stack([chunk.as_matrix(source) for source in sources])
    grams = jnp.stack([widen(gram) for gram in chunk.extras["grams"]])
    merged = combine(weights, grams, values["weight"], values["alpha"], values["ridge"])
    return chunk.from_matrix(merged)


def _solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """matrix^-1 right for a symmetric matrix; zeros, in the gradients too, where it is not positive definite."""
    factor = cholesky(matrix)
    definite = jnp.all(jnp.isfinite(factor))
    factor = jnp.where(definite, factor, jnp.eye(len(factor), dtype=factor.dtype))

    # Gradients are solved for with the same factor, and so are zero where the result is.
    def solve(_: object, b: jax.Array) -> jax.Array:
        return jnp.where(definite, cholesky_solve(factor, b), 0.0)

    def product(x: jax.Array) -> jax.Array:
        return jnp.matmul(matrix, x, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.custom_linear_solve(product, right, solve, symmetric=True)
