"""Kronecker factors of the Fisher information of linear layers, captured from the traced program."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.methods.extras import Gram
from jaxmerge.methods.leaf import widen
from jaxmerge.statistics.grams import (
    GramSum,
    Where,
    add,
    check_batches,
    check_where,
    gathered,
    gram_of,
    is_kept,
    is_like,
)
from jaxmerge.tracing import Site, Use, Visit, interpret, sites

Sums = tuple[dict[str, GramSum], dict[str, GramSum]]


def kronecker_factors(
    apply_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
    *,
    key: jax.Array | None = None,
    labels: Iterable[Any] | None = None,
    where: Where = None,
) -> tuple[dict[str, Gram], dict[str, Gram]]:
    r"""The two factors of each linear layer's Fisher information, :math:`F \approx A \otimes B` (K-FAC).

    .. math:: A = \tfrac{1}{n} \sum_i a_i a_i^\top, \quad B = \tfrac{1}{n} \sum_i g_i g_i^\top, \quad
       g_i = \nabla_{s_i} \log p(y | x)

    for a layer with inputs a and outputs s, one row i per example and position. An example's gradient is that of its
    own log-probability (summed over its positions), never of a batch's mean, so the model must not mix the examples of
    a batch. y is drawn from the model with `key`, which gives the Fisher information, or it is what `labels` says (the
    empirical one). Which parameters are linear layers is read off the program, as for `grams`.

    Args:
      apply_fn: a traceable function (params, inputs) -> logits [..., classes]; hashable. One program is compiled per
        function and shape of batch.
      params: any pytree of arrays.
      batches: inputs of the model, each a pytree of arrays; read once, one at a time.
      key: draws y; batch i takes ``fold_in(key, i)``.
      labels: int [...] for each batch, the classes; instead of `key`. A negative label has no gradient.
      where: patterns of paths to keep, as for `grams`.

    Returns:
      A by path of leaf, with the leaf's input axes, and B by path, with its output axes; stacked layers as for `grams`.
      B lacks leaves of which the program somewhere contracts a slice of the outputs only.

    Raises:
      ValueError: neither or both of key and labels, no batch, labels of another shape or number.

    Example:
      >>> import jax.numpy as jnp
      >>> apply_fn = lambda params, x: x @ params["w"]
      >>> params, x, y = {"w": jnp.zeros((2, 2))}, jnp.eye(2), jnp.array([0, 1])
      >>> inputs, outputs = kronecker_factors(apply_fn, params, [x], labels=[y])
      >>> print(inputs["w"].matrix, outputs["w"].matrix, outputs["w"].axes, sep="\n")
      [[0.5 0. ]
       [0.  0.5]]
      [[ 0.25 -0.25]
       [-0.25  0.25]]
      (1,)

    Reference:
      Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015; Tam et
      al., Merging by matching models in task parameter subspaces, TMLR 2024.
    """
    if (key is None) == (labels is None):
        raise ValueError("Kronecker factors need either key= (y drawn from the model) or labels=")
    check_batches(batches)
    patterns = check_where(where, params)
    pairs: Iterable[tuple[Any, Any]] = (
        ((batch, None) for batch in batches)
        if labels is None
        else itertools.zip_longest(batches, labels, fillvalue=_MISSING)
    )
    sums: Sums | None = None
    for i, (batch, y) in enumerate(pairs):
        if batch is _MISSING or y is _MISSING:
            raise ValueError(
                f"labels needs one array per batch; after {i} there are no more "
                f"{'batches' if batch is _MISSING else 'labels'}"
            )
        draw = None if key is None else jax.random.fold_in(key, i)
        one = _sums(params, batch, draw, y, apply_fn=apply_fn, where=patterns)
        sums = one if sums is None else add(sums, one)
    if sums is None:
        raise ValueError("Kronecker factors need at least one batch of inputs, found none")
    inputs, outputs = ({path: one.mean() for path, one in side.items()} for side in sums)
    return inputs, outputs


def batch_factors(
    apply_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    inputs: Any,
    *,
    key: jax.Array | None = None,
    labels: Any = None,
    where: Where = None,
) -> Sums:
    """The sums behind `kronecker_factors` for one batch, as a pure function to jit or vmap.

    Args:
      apply_fn, params, where: as for `kronecker_factors`.
      inputs: one batch.
      key: draws y from the model.
      labels: int, of the shape of the logits without the last axis; instead of `key`.
    """
    first: dict[str, Site] = {}
    sliced = set()
    for site in sites(apply_fn, params, inputs):
        if is_kept(site.path, where):
            first.setdefault(site.path, site)
            if not site.whole:
                sliced.add(site.path)

    def objective(
        squares: dict[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, GramSum]]:
        def visit(site: Site, use: Use) -> Visit:
            if site.path not in first or not is_like(first[site.path], site):
                return Visit()
            record = gram_of(use.inputs)
            if site.path not in squares:
                return Visit(record)
            square = squares[site.path]
            if use.layer is not None:
                square = jax.lax.dynamic_index_in_dim(square, use.layer, keepdims=False)
            return Visit(record, output=lambda output: _tapped(use.rows, output, square))

        walked = interpret(apply_fn, params, inputs, visit)
        logits = widen(walked.outputs)
        one_hot = jax.nn.one_hot(_classes(key, labels, logits), logits.shape[-1])
        return jnp.sum(jax.nn.log_softmax(logits) * one_hot), gathered(walked.records)

    zeros = {path: _square(site) for path, site in first.items() if path not in sliced}
    squares, totals = jax.grad(objective, has_aux=True)(zeros)
    outputs = {
        path: GramSum(square, totals[path].count, first[path].outputs)
        for path, square in squares.items()
    }
    return totals, outputs


_MISSING = object()


def _tapped(
    rows: Callable[[jax.Array], jax.Array], output: jax.Array, square: jax.Array
) -> jax.Array:
    """The output as it is; the gradient with respect to `square` [out, out] is the sum of g g^T over its rows.

    As a gradient the sum runs over all uses of the leaf and all turns of a loop by itself.
    """

    @jax.custom_vjp
    def tap(output: jax.Array, square: jax.Array) -> jax.Array:
        return output

    def forward(output: jax.Array, square: jax.Array) -> tuple[jax.Array, None]:
        return output, None

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        return gradient, gram_of(rows(gradient))[0].astype(jnp.float32)

    tap.defvjp(forward, backward)
    return tap(output, square)


def _square(site: Site) -> jax.Array:
    """Zeros of the shape of the sum of g g^T over a site's outputs."""
    width = math.prod(site.shape[axis] for axis in site.outputs)
    layers = () if site.layers is None else (site.layers,)
    return jnp.zeros((*layers, width, width), jnp.float32)


def _classes(key: jax.Array | None, labels: Any, logits: jax.Array) -> jax.Array:
    """y [...] for logits [..., classes]: as given, or drawn."""
    if labels is None:
        if key is None:
            raise ValueError("y needs key= to be drawn with, or labels=")
        return jax.random.categorical(key, jax.lax.stop_gradient(logits))
    labels = jnp.asarray(labels)
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels should be integers of shape {list(logits.shape[:-1])} beside logits of shape "
            f"{list(logits.shape)}, found {labels.dtype} {list(labels.shape)}"
        )
    return labels


@functools.partial(jax.jit, static_argnames=("apply_fn", "where"))
def _sums(
    params: Any,
    batch: Any,
    key: jax.Array | None,
    labels: Any,
    *,
    apply_fn: Callable[[Any, Any], jax.Array],
    where: Where,
) -> Sums:
    return batch_factors(apply_fn, params, batch, key=key, labels=labels, where=where)
