"""Selections for a sweep: sort the magnitudes once, then look each count up."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxmerge.methods.selection_host import is_on_host, order_on_host
from jaxmerge.methods.selection_keys import (
    Selection,
    alike,
    checked_size,
    checked_total,
    clipped_count,
    common_dtype,
    entries,
    key_bits,
    key_format,
    keys_as,
    narrowed_to,
    nothing,
    regrouping,
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
    search in the tensor's order. Tensors of equal shape and type are stacked, one copy of them and
    their orders, however many counts are looked up in one program; no other pass is made.

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
    if not filled:
        return [nothing(v.dtype) for v in values]
    thresholds, cuts = _look_up_over([values[i] for i in filled], [orders[i] for i in filled], k)
    found = dict(zip(filled, entries(cuts), strict=True))
    return [
        Selection(thresholds[v.dtype.name], found[i]) if i in found else nothing(v.dtype)
        for i, v in enumerate(values)
    ]


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
def _look_up_over(
    values: list[Array], orders: list[Array], k: Array
) -> tuple[dict[str, Array], Array]:
    places = alike(values)
    dtype = common_dtype([v.dtype for v in values])
    keys_of = keys_as(dtype)
    flat = [jnp.stack([values[i].reshape(-1) for i in same]) for same in places]
    sorting = [jnp.stack([orders[i] for i in same]) for same in places]
    grouped, ranks = regrouping(places)
    ends = np.cumsum([len(same) for same in places])[:-1]
    sizes = jnp.array([values[i].size for i in grouped], jnp.int32)

    def indices_at(ranks: Array) -> list[Array]:
        """The flat indices [tensors of the group, 1] of the entries of one rank in each tensor."""
        return [
            jnp.take_along_axis(o, rank[:, None], axis=1, mode="clip")
            for o, rank in zip(sorting, jnp.split(ranks, ends), strict=True)
        ]

    def keys_at(ranks: Array) -> Array:
        found = [
            keys_of(jnp.take_along_axis(v, index, axis=1)[:, 0])
            for v, index in zip(flat, indices_at(ranks), strict=True)
        ]
        return jnp.concatenate(found)

    def reaching(key: Array, low: Array, high: Array) -> Array:
        """How many entries of each tensor have that key or a larger one, known to be in a range."""

        def open_ranges(bounds: tuple[Array, Array]) -> Array:
            return jnp.any(bounds[0] < bounds[1])

        def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = low + (high - low) // 2
            reach = (keys_at(middle) >= key) & (low < high)
            return jnp.where(reach, middle + 1, low), jnp.where(reach, high, middle)

        return jax.lax.while_loop(open_ranges, halve, (low, high))[0]

    width = key_format(dtype).width

    def set_bit(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # `above` entries have a key too large to be the threshold, `enough` reach it.
        threshold, above, enough = state
        key = threshold | (jnp.uint32(1 << (width - 1)) >> i.astype(jnp.uint32))
        reached = reaching(key, above, enough)
        higher = jnp.sum(reached.astype(jnp.uint32), dtype=jnp.uint32) >= k
        return (
            jnp.where(higher, key, threshold),
            jnp.where(higher, above, reached),
            jnp.where(higher, reached, enough),
        )

    start = (jnp.uint32(0), jnp.zeros_like(sizes), sizes)
    threshold, above, enough = jax.lax.fori_loop(0, width, set_bit, start)
    equal = (enough - above).astype(jnp.uint32)
    kept = share(equal[ranks], k - jnp.sum(above.astype(jnp.uint32), dtype=jnp.uint32))[grouped]
    last = jnp.concatenate(indices_at(above + kept.astype(jnp.int32) - 1))[:, 0]
    cuts = jnp.where(kept > 0, last, jnp.int32(-1))[ranks]
    return narrowed_to(threshold, dtype, values), cuts
