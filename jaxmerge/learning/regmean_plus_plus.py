"""RegMean++: RegMean layer by layer, on the inputs that the merged layers before give."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.methods.inputs import flatten_all, is_mergeable
from jaxmerge.methods.leaf import widen
from jaxmerge.methods.operators.regmean import combine
from jaxmerge.statistics.grams import GramSum, gathered, gram_of
from jaxmerge.tracing import Site, Use, Visit, interpret
from jaxmerge.tree import flatten, unflatten


def regmean_plus_plus(
    apply_fn: Callable[[Any, Any], Any],
    models: Sequence[Any],
    batches: Sequence[Any],
    *,
    alpha: jax.Array | float = 0.9,
    weight: jax.Array | Sequence[float] | float = 1.0,
    ridge: jax.Array | float = 1e-6,
) -> Any:
    r"""Merges linear layers in the program's order, each on what the merged layers before it make of every task's data.

    .. math:: W = \bar W + \Big(\sum_t w_t (W_t - \bar W) G_t'\Big) \Big(\sum_t w_t G_t' + r I\Big)^{-1}

    as in RegMean (see `jaxmerge.methods.operators.regmean.combine`), but the Gram matrix :math:`G_t` of a layer is that
    of the inputs which task t's data has there in the merged model, not in model t. All parameters are averaged first;
    then the program runs once with all tasks side by side, and every linear layer is replaced when it is reached. Which
    parameters are linear layers is read off the program (see `jaxmerge.tracing.interpret`); layers that a scan takes
    from a stack are merged one after the other. Tied weights are merged where they are first used. What a loop uses in
    every turn (a recurrent weight) stays the mean while the program runs and is merged at the end, on the inputs of
    all turns. Differentiable with respect to models, alpha, weight and ridge.

    Args:
      apply_fn: a traceable function (params, inputs) -> anything; hashable. One program is compiled per function and
        shapes.
      models: pytrees of equal structure.
      batches: one batch of inputs per model, all of the same shapes: pytrees of arrays.
      alpha: what off-diagonal entries of Gram matrices are multiplied by.
      weight: of each model [models], or one for all.
      ridge: pull towards the mean, relative to the mean of the summed Gram matrices' diagonal.

    Returns:
      The merged model: a pytree like the first, in its dtypes; integer tensors are the first model's.

    Raises:
      ValueError: models that differ in structure, another number of batches or weights than models, batches that differ
        in shape.

    Example:
      >>> import jax.numpy as jnp
      >>> apply_fn = lambda params, x: x @ params["w"]
      >>> a, b = {"w": jnp.array([[1.0], [5.0]])}, {"w": jnp.array([[7.0], [2.0]])}
      >>> first, second = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
      >>> print(regmean_plus_plus(apply_fn, [a, b], [first, second])["w"].round(2))
      [[1.]
       [2.]]

    Reference:
      Nguyen et al., RegMean++: enhancing effectiveness and generalization of regression mean for model merging, 2025.
    """
    if not models:
        raise ValueError("regmean_plus_plus needs at least one model, found an empty list")
    flatten_all(models, None)
    _check_batches(models, batches)
    weight = jnp.asarray(weight, jnp.float32)
    if weight.shape not in ((), (len(models),)):
        raise ValueError(
            f"weight is a scalar or one number per model ({len(models)}), found shape {list(weight.shape)}"
        )
    strengths = {
        "weight": weight,
        "alpha": jnp.asarray(alpha, jnp.float32),
        "ridge": jnp.asarray(ridge, jnp.float32),
    }
    return _merged(tuple(models), tuple(batches), strengths, apply_fn=apply_fn)


@functools.partial(jax.jit, static_argnames="apply_fn")
def _merged(
    models: tuple[Any, ...],
    batches: tuple[Any, ...],
    strengths: dict[str, jax.Array],
    *,
    apply_fn: Callable[[Any, Any], Any],
) -> Any:
    leaves, definition = flatten(models[0])
    flat = [flatten(model)[0] for model in models]
    mergeable = {path for path, leaf in leaves.items() if is_mergeable(leaf)}
    stacked = {
        path: jnp.stack([widen(jnp.asarray(one[path])) for one in flat]) for path in mergeable
    }
    start = unflatten(
        definition,
        (
            jnp.mean(stacked[path], axis=0).astype(leaf.dtype) if path in mergeable else leaf
            for path, leaf in leaves.items()
        ),
    )

    merged = set()

    def visit(site: Site, use: Use) -> Visit:
        if use.replaced:
            return Visit()
        if site.repeated:
            return Visit(record=gram_of(use.inputs))
        merged.add(site.path)
        total, count = jax.lax.all_gather(gram_of(use.inputs), "models")
        weights = stacked[site.path]
        if use.layer is not None:
            weights = jax.lax.dynamic_index_in_dim(weights, use.layer, axis=1, keepdims=False)
        grams = total / jnp.maximum(count, 1)[:, None, None]
        return Visit(parameter=_combined(weights, grams, strengths, inputs=site.inputs))

    def walk(inputs: Any) -> tuple[Any, dict[str, GramSum]]:
        found = interpret(apply_fn, start, inputs, visit)
        return found.params, gathered(found.records)

    # Under vmap each task has its own activations, and what is gathered from all of them is computed once.
    together = jax.vmap(walk, axis_name="models", out_axes=(None, 0))
    params, in_loops = together(jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches))
    result = flatten(params)[0]
    for path, sums in in_loops.items():
        if path not in merged:
            result[path] = _after_loops(stacked[path], sums, strengths).astype(leaves[path].dtype)
    return unflatten(definition, result.values())


def _after_loops(
    weights: jax.Array, sums: GramSum, strengths: Mapping[str, jax.Array]
) -> jax.Array:
    """Merges a leaf, or each of its layers, from the sums over a loop's turns."""
    gram = sums.mean()

    def one(weights: jax.Array, grams: jax.Array) -> jax.Array:
        return _combined(weights, grams, strengths, inputs=gram.axes)

    stacked = gram.matrix.ndim == 4
    return jax.vmap(one, in_axes=1)(weights, gram.matrix) if stacked else one(weights, gram.matrix)


# Jitted: layers of equal shape are traced once.
@functools.partial(jax.jit, static_argnames="inputs")
def _combined(
    weights: jax.Array,
    grams: jax.Array,
    strengths: Mapping[str, jax.Array],
    *,
    inputs: tuple[int, ...],
) -> jax.Array:
    """`combine` for a leaf of any layout: weights [models, *shape], grams [models, in, in]."""
    shape = weights.shape[1:]
    order = [*(axis for axis in range(len(shape)) if axis not in inputs), *inputs]
    matrices = weights.transpose((0, *(axis + 1 for axis in order)))
    width = grams.shape[-1]
    out = combine(matrices.reshape((len(weights), -1, width)), grams, **strengths)
    return out.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def _check_batches(models: Sequence[Any], batches: Sequence[Any]) -> None:
    if not isinstance(batches, Sequence):
        raise ValueError(
            f"batches is a list with one batch of inputs per model, found {type(batches).__name__}"
        )
    if len(batches) != len(models):
        raise ValueError(
            f"regmean_plus_plus needs one batch per model ({len(models)}), found {len(batches)}"
        )
    first, structure = flatten(batches[0])
    for i, batch in enumerate(batches):
        other, found = flatten(batch)
        if found != structure:
            raise ValueError(f"batches[{i}] is {found}, batches[0] is {structure}")
        for path, leaf in first.items():
            expected, shape = list(np.shape(leaf)), list(np.shape(other[path]))
            if shape != expected:
                where = f" at {path!r}" if path else ""
                raise ValueError(
                    f"batches[{i}] has shape {shape}{where}, batches[0] has {expected}: tasks run side by side"
                )
