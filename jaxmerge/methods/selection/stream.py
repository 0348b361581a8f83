"""The selection over a stream: counts that add up over chunks, or over the tensors of a model.

For float32 values two passes give the threshold, for 16-bit values one; a last one places the cut:

1. Sum `histogram(chunk)` over the chunks, `top = refine(counts, k)`.
2. Unless `levels(dtype)` is 1: sum `histogram(chunk, top.prefix)`,
   `top = refine(counts, top.remaining, top.prefix)`.
3. `top.prefix` is the threshold; `top.remaining` of the entries equal to it are kept. `share` says
   how many of them lie in each chunk or tensor, from their `equal_count`; `cut_position` finds the
   last one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxmerge.methods.selection.kernel import (
    Route,
    by_platform,
    digit_counts,
    enter_digit,
    nth_equal,
)
from jaxmerge.methods.selection.keys import checked_size, clipped_count, key_bits, key_format

_LOW_BITS = 16


class Refinement(NamedTuple):
    """What the levels so far say about the smallest kept value.

    Attributes:
        prefix: uint32 scalar, the high bits of its key; after the last level, the whole key.
        remaining: uint32 scalar, how many entries with this prefix are kept.
    """

    prefix: Array
    remaining: Array


def levels(dtype: np.dtype) -> int:
    """The number of histograms that a selection needs: 2 for float32, 1 for 16-bit types."""
    return 2 if key_format(dtype).width > _LOW_BITS else 1


def histogram(values: Array, prefix: ArrayLike | None = None) -> Array:
    """Counts the values by the high bits of their keys, or by the low ones below a prefix.

    Args:
        values: float32, bfloat16 or float16 array of any shape.
        prefix: `Refinement.prefix` of the level before; float32 values only.

    Returns:
        uint32 [32768], or [65536] with a prefix. Sums over chunks are counts of the whole.

    Raises:
        ValueError: If 16-bit values are given with a prefix: their first level is the whole key.

    Example:
        >>> counts = histogram(jnp.array([1.0, 2.0, 1.0]))
        >>> int(counts.sum()), int(counts.max())
        (3, 2)
    """
    if prefix is None:
        return _histogram(values)
    if levels(values.dtype) == 1:
        raise ValueError(f"{values.dtype} keys have one level: no prefix was expected")
    return _histogram_below(values, jnp.asarray(prefix, jnp.uint32))


@jax.jit
def refine(counts: Array, k: Array, prefix: Array | None = None) -> Refinement:
    """Descends one level: finds the bin in which the k-th largest value lies.

    Args:
        counts: uint32 `histogram` of everything, by the bits below `prefix`.
        k: How many of the counted entries are kept: the count at the first level, then the
            `remaining` of the level before. Limited to the number of entries.
        prefix: The prefix of the level before.

    Returns:
        The prefix longer by one level, and how many entries with that prefix are kept.

    Example:
        >>> values = jnp.array([1.0, 2.0, 1.0, 0.5])
        >>> top = refine(histogram(values), 2)
        >>> low = refine(histogram(values, top.prefix), top.remaining, top.prefix)
        >>> hex(int(low.prefix)), int(low.remaining)
        ('0x3f800000', 1)
    """
    total = jnp.sum(counts, dtype=jnp.uint32)
    k = jnp.minimum(jnp.asarray(k).astype(jnp.uint32), total)
    digit, remaining = by_platform(enter_digit, counts, k)
    if prefix is None:
        return Refinement(digit, remaining)
    return Refinement((jnp.asarray(prefix, jnp.uint32) << _LOW_BITS) | digit, remaining)


@jax.jit
def equal_count(values: Array, threshold: Array) -> Array:
    """The number of values whose key is the threshold, as uint32 scalar."""
    return jnp.sum(key_bits(values) == jnp.asarray(threshold, jnp.uint32), dtype=jnp.uint32)


@jax.jit
def share(equal_counts: Array, remaining: Array) -> Array:
    """Splits the kept entries at the threshold over tensors (or chunks): earlier ones first.

    Args:
        equal_counts: uint32 [tensors], each tensor's `equal_count`, in order.
        remaining: How many of those entries are kept.

    Returns:
        uint32 [tensors], how many each tensor keeps.

    Example:
        >>> share(jnp.array([2, 0, 3, 1]), 4).tolist()
        [2, 0, 2, 0]
    """
    counts = jnp.asarray(equal_counts, jnp.uint32)
    before = jnp.cumsum(counts, dtype=jnp.uint32) - counts
    remaining = jnp.asarray(remaining, jnp.uint32)
    return jnp.minimum(jnp.maximum(remaining, before) - before, counts)


def cut_position(values: Array, threshold: ArrayLike, m: ArrayLike) -> Array:
    """The flat index of the m-th entry (from 1) whose key is the threshold.

    Args:
        values: float32, bfloat16 or float16 array of any shape.
        threshold: uint32 scalar key.
        m: At most the number of such entries.

    Returns:
        int32 scalar; -1 for m = 0.

    Example:
        >>> int(cut_position(jnp.array([1.0, 3.0, 1.0]), key_bits(jnp.float32(1.0)), 2))
        2
    """
    size = checked_size(values.shape)
    if size == 0:
        return jnp.int32(-1)
    return _cut_position(values, jnp.asarray(threshold, jnp.uint32), clipped_count(m, size))


@jax.jit
def _histogram(values: Array) -> Array:
    width = key_format(values.dtype).width
    shift = _LOW_BITS if width > _LOW_BITS else 0
    return _counts(values, jnp.uint32(0), jnp.uint32(shift), width - shift)


@jax.jit
def _histogram_below(values: Array, prefix: Array) -> Array:
    return _counts(values, prefix, jnp.uint32(0), _LOW_BITS)


def _counts(values: Array, prefix: Array, shift: Array, bits: int) -> Array:
    def kernel(values: Array, prefix: Array, shift: Array, *, route: Route) -> Array:
        return digit_counts(values, key_bits, prefix, shift, bits, route)

    # So many bins cannot be counted by comparisons: accelerators scatter, too.
    return by_platform(kernel, values, prefix, shift, accelerator="histogram")


@jax.jit
def _cut_position(values: Array, threshold: Array, m: Array) -> Array:
    def kernel(values: Array, threshold: Array, m: Array, *, route: Route) -> Array:
        return nth_equal(values, key_bits, threshold, m, route)

    return by_platform(kernel, values, threshold, m)
