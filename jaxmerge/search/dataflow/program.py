"""The program of a data flow: one scan over the slots, in which every slot runs or lets the hidden states pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LayerFunction = Callable[..., jax.Array]
"""(layer, hidden, *context) -> hidden, of the same shape and dtype; `layer` is a tree without the axis of layers."""

Scale = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(previous layer or -1, current layer, slot), int32 [] each, -> the factor [] of what the current layer reads."""


def run(
    layer_fn: LayerFunction,
    layers: Any,
    on: jax.Array,
    scale: Scale | None,
    hidden: jax.Array,
    *context: Any,
    skip: bool = False,
) -> jax.Array:
    r"""Runs the layers whose slots are on, in the order of the slots.

    .. math:: h \leftarrow \begin{cases} f_{t \bmod M}(W_{ij} \, h) & z_t = 1 \\ h & z_t = 0 \end{cases}
       \qquad t = 0 \ldots T - 1

    with j = t mod M, and i the layer that ran before. The layer of a slot is the same whatever is on, so that under a
    `vmap` over candidates the layers stay without that axis: each slot's weights are read once for all candidates.
    Slots that are off are computed and dropped.

    Args:
      layer_fn: one layer, a pure function.
      layers: a tree whose leaves have a leading axis of M layers.
      on: z, bool [T]; T is a multiple of M.
      scale: W; None: 1 everywhere.
      hidden: what the first layer reads, float [...].
      *context: what the layers read beside it.
      skip: slots that are off are not computed. For candidates that run one by one: under `vmap` each would get a copy
        of the weights.

    Returns:
      The last layer's result, in the shape and dtype of `hidden`; `hidden` itself where nothing is on.

    Raises:
      ValueError: T is no multiple of M, or the function of a layer returns another shape or dtype than it is given.

    Example:
      >>> layers = {"add": jnp.array([1.0, 10.0])}
      >>> on = jnp.array([True, False, True, True])
      >>> run(lambda layer, h: 2 * h + layer["add"], layers, on, None, jnp.zeros(1))
      Array([16.], dtype=float32)
    """
    depth = jax.tree.leaves(layers)[0].shape[0]
    count = on.shape[0]
    if count % depth:
        raise ValueError(f"{count} slots are no multiple of {depth} layers")
    hidden = jnp.asarray(hidden)
    _check(layer_fn, layers, hidden, context)

    def one(carry: tuple[jax.Array, jax.Array], slot: tuple[jax.Array, jax.Array]) -> Any:
        hidden, previous = carry
        at, is_on = slot
        current = at % depth

        def through(hidden: jax.Array) -> jax.Array:
            if scale is not None:
                hidden = hidden * scale(previous, current, at).astype(hidden.dtype)
            return layer_fn(_layer(layers, current), hidden, *context)

        if skip:
            hidden = jax.lax.cond(is_on, through, lambda hidden: hidden, hidden)
        else:
            hidden = jnp.where(is_on, through(hidden), hidden)
        return (hidden, jnp.where(is_on, current, previous)), None

    slots = jnp.arange(count, dtype=jnp.int32)
    start = (hidden, jnp.asarray(-1, jnp.int32))
    (hidden, _), _ = jax.lax.scan(one, start, (slots, on.astype(bool)))
    return hidden


def neighbours(on: jax.Array, depth: int) -> jax.Array:
    """Which pairs of layers follow each other.

    Args:
      on: bool [T].
      depth: M, the number of layers.

    Returns:
      bool [M, M]; [i, j] where a slot of layer j comes next after one of layer i.

    Example:
      >>> neighbours(jnp.array([True, False, True, True]), 2).astype(int)
      Array([[1, 1],
             [0, 0]], dtype=int32)
    """

    def one(carry: tuple[jax.Array, jax.Array], slot: tuple[jax.Array, jax.Array]) -> Any:
        found, previous = carry
        at, is_on = slot
        current = at % depth
        pair = jnp.arange(depth**2).reshape(depth, depth) == previous * depth + current
        found = found | (pair & is_on & (previous >= 0))
        return (found, jnp.where(is_on, current, previous)), None

    slots = jnp.arange(on.shape[0], dtype=jnp.int32)
    start = (jnp.zeros((depth, depth), bool), jnp.asarray(-1, jnp.int32))
    (found, _), _ = jax.lax.scan(one, start, (slots, on.astype(bool)))
    return found


def _layer(layers: Any, index: jax.Array) -> Any:
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), layers
    )


def _check(layer_fn: LayerFunction, layers: Any, hidden: jax.Array, context: Any) -> None:
    found = jax.eval_shape(
        lambda layers, hidden: layer_fn(_layer(layers, jnp.asarray(0)), hidden, *context),
        layers,
        hidden,
    )
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise ValueError(f"the function of a layer returns one array, found {found}")
    if (found.shape, found.dtype) != (hidden.shape, hidden.dtype):
        raise ValueError(
            f"the function of a layer is given {hidden.dtype.name} {list(hidden.shape)} and returns "
            f"{found.dtype.name} {list(found.shape)}"
        )
