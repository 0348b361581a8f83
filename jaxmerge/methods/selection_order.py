"""Selections for a sweep: sort the magnitudes once, then look each count up."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxmerge.methods.selection_host import is_on_host, order_on_host
from jaxmerge.methods.selection_keys import (
    Selection,
    checked_size,
    checked_total,
    clipped_count,
    common_dtype,
    key_bits,
    key_format,
    keys_as,
    narrowed,
    nothing,
)
from jaxmerge.methods.selection_stream import share


def order(values: Array) -> Array:
    """The permutation that sorts the values from the largest to the smallest.

    Args:
        values: Nonnegative float32, bfloat16 or float16 array of any shape, on one device.

    Returns:
        int32 [size], row-major flat indices; equal values by index.

    Example:
        >>> order(jnp.array([1.0, 3.0, 1.0, 2.0])).tolist()
        [1, 3, 0, 2]
    """
    checked_size(values.shape)
    if is_on_host(values):
        return jnp.asarray(order_on_host(values))
    return _order_compiled(values)


def look_up(values: Array, order: Array, k: ArrayLike) -> Selection:
    """Selects the k largest values by their order, in constant time.

    Args:
        values: What `order` was made from.
        order: int32 [size].
        k: Integer scalar, may be traced; limited to 0..size.

    Returns:
        The same selection as `select(values, k)`.

    Example:
        >>> values = jnp.array([1.0, 3.0, 1.0, 2.0])
        >>> int(look_up(values, order(values), 3).cut)
        0
    """
    size = checked_size(values.shape)
    if size == 0:
        return nothing(values.dtype)
    return _look_up(values, order, clipped_count(k, size))


def look_up_over(values: Sequence[Array], orders: Sequence[Array], k: ArrayLike) -> list[Selection]:
    """Selects the k largest values of all tensors together by their orders.

    The threshold is bisected on its bits; how many entries of a tensor reach a key is a binary
    search in the tensor's order. No pass over the data is made.

    Args:
        values: Nonnegative arrays of any shapes; types may differ.
        orders: `order` of each.
        k: Integer scalar, may be traced; limited to the number of entries.

    Returns:
        The same selections as `select_over(values, k)`.

    Example:
        >>> values = [jnp.array([1.0, 3.0]), jnp.array([2.0, 1.0])]
        >>> [int(s.cut) for s in look_up_over(values, [order(v) for v in values], 3)]
        [0, -1]
    """
    total = checked_total([v.shape for v in values])
    if len(values) != len(orders):
        raise ValueError(
            f"an order for each of {len(values)} tensors was expected, found {len(orders)}"
        )
    k = clipped_count(k, total)
    filled = [i for i, v in enumerate(values) if v.size]
    selections = [nothing(v.dtype) for v in values]
    if filled:
        found = _look_up_over([values[i] for i in filled], [orders[i] for i in filled], k)
        for i, selection in zip(filled, found, strict=True):
            selections[i] = selection
    return selections


@jax.jit
def _order_compiled(values: Array) -> Array:
    keys = ~key_bits(values).reshape(-1)
    index = jnp.arange(keys.size, dtype=jnp.int32)
    return jax.lax.sort((keys, index), num_keys=1, is_stable=True)[1]


@jax.jit
def _look_up(values: Array, order: Array, k: Array) -> Selection:
    cut = order[jnp.maximum(k, 1) - 1]
    threshold = key_bits(values.reshape(-1)[cut])
    none = nothing(values.dtype)
    return Selection(jnp.where(k == 0, none.threshold, threshold), jnp.where(k == 0, none.cut, cut))


@jax.jit
def _look_up_over(values: list[Array], orders: list[Array], k: Array) -> list[Selection]:
    dtype = common_dtype([v.dtype for v in values])
    keys_of = keys_as(dtype)
    flat = [v.reshape(-1) for v in values]
    sizes = jnp.array([v.size for v in flat], jnp.int32)
    steps = max(v.size for v in flat).bit_length()
    places = range(len(flat))

    def reaching(key: Array) -> Array:
        """How many entries of each tensor have that key or a larger one."""

        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = low + (high - low) // 2
            # One gather for each tensor; the search itself is shared.
            keys = [keys_of(flat[i][orders[i][middle[i]]]) for i in places]
            reach = (jnp.stack(keys) >= key) & (low < high)
            return jnp.where(reach, middle + 1, low), jnp.where(reach, high, middle)

        return jax.lax.fori_loop(0, steps, halve, (jnp.zeros_like(sizes), sizes))[0]

    def set_bit(i: Array, threshold: Array) -> Array:
        key = threshold | (jnp.uint32(1 << (width - 1)) >> i.astype(jnp.uint32))
        enough = jnp.sum(reaching(key).astype(jnp.uint32), dtype=jnp.uint32) >= k
        return jnp.where(enough, key, threshold)

    width = key_format(dtype).width
    threshold = jax.lax.fori_loop(0, width, set_bit, jnp.uint32(0))
    reached = jax.vmap(reaching)(jnp.stack([threshold + 1, threshold])).astype(jnp.uint32)
    above = reached[0]
    kept = share(reached[1] - above, k - jnp.sum(above, dtype=jnp.uint32))
    last = (above + kept).astype(jnp.int32) - 1
    cuts = [
        jnp.where(kept[i] > 0, orders[i][jnp.maximum(last[i], 0)], jnp.int32(-1)) for i in places
    ]
    return [
        Selection(narrowed(threshold, dtype, v.dtype), cut)
        for v, cut in zip(values, cuts, strict=True)
    ]
