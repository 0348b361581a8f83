"""All examples through a model, batch by batch, in one trace."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.evaluation.scores import Scores, score


def over_batches(
    function: Callable[[Any], Any], examples: Any, *, batch_size: int | None = None
) -> Any:
    """Applies a function to all examples, batch by batch.

    The last batch is filled up with copies of the first example, whose results are dropped. The function is traced
    once, whatever the number of batches; memory holds one batch and what the function returns.

    Args:
      function: from a batch, a pytree of arrays [batch_size, ...], to a pytree of arrays [batch_size, ...]. Pure.
      examples: a pytree of arrays [examples, ...].
      batch_size: static; None: all examples at once.

    Returns:
      The function's results, arrays [examples, ...].

    Raises:
      ValueError: no examples, arrays of different lengths, or a batch size below 1.

    Example:
      >>> over_batches(lambda x: 2 * x, jnp.arange(5), batch_size=2)
      Array([0, 2, 4, 6, 8], dtype=int32)
    """
    shapes = {jnp.shape(x)[:1] for x in jax.tree.leaves(examples)}
    if len(shapes) != 1 or () in shapes or (0,) in shapes:
        raise ValueError(
            f"expected arrays of one number of examples, at least 1; found {sorted(shapes)}"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, found {batch_size}")
    ((count,),) = shapes
    if batch_size is None or batch_size >= count:
        return function(examples)
    batches = -(-count // batch_size)

    def split(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        missing = batches * batch_size - count
        filled = jnp.concatenate([x, jnp.broadcast_to(x[:1], (missing, *x.shape[1:]))])
        return filled.reshape(batches, batch_size, *x.shape[1:])

    results = jax.lax.map(function, jax.tree.map(split, examples))
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:count], results)


@functools.partial(jax.jit, static_argnames=("apply_fn", "batch_size", "score"))
def score_batches(
    apply_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    inputs: Any,
    labels: jax.Array,
    mask: jax.Array | None = None,
    *,
    batch_size: int | None = None,
    score: Callable[..., Scores] = score,
) -> Scores:
    """Scores a model on all examples, batch by batch; the logits of only one batch are held.

    Under `jax.vmap` over `params` it scores a population.

    Args:
      apply_fn: (params, inputs) -> logits [examples, ..., classes]; static.
      params: the parameters.
      inputs: an array [examples, ...], or a pytree of such arrays.
      labels: int [examples, ...], as `score` takes them; a decoder's are its tokens.
      mask: bool of the labels' shape, False for padding; None: everything counts.
      batch_size: static; None: all examples at once.
      score: `score`, or `score_next_tokens` for a decoder.

    Returns:
      `Scores` of all examples.

    Raises:
      ValueError: as for `over_batches`.

    Example:
      >>> from jaxmerge.evaluation import accuracy
      >>> apply_fn = lambda params, x: x * params
      >>> images, labels = jnp.eye(5), jnp.arange(5)
      >>> accuracy(score_batches(apply_fn, jnp.ones((1, 5)), images, labels, batch_size=2))
      Array(1., dtype=float32)
    """

    def one(batch: Any) -> Scores:
        batch_inputs, batch_labels, batch_mask = batch
        return score(apply_fn(params, batch_inputs), batch_labels, batch_mask)

    return over_batches(one, (inputs, labels, mask), batch_size=batch_size)
