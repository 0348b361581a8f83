"""The compiled selection: a radix descent over the bits of the keys, without sorting.

The k-th largest key is found digit by digit, from the highest: count how many entries that share
the digits found so far have each value of the next one, and step into the value in which the k-th
lies. Three routes differ only in how they count:

- "histogram": one scatter-add over the whole array. Partitions under sharding to local histograms
  and a sum; linear time for any input.
- "blocks": the same scatter-add over blocks that fit a core's cache, in a loop; about twice as
  fast on a CPU, but a sharded array would be gathered.
- "bisection": digits of a few bits, counted by comparisons in one reduction. For accelerators,
  where a scatter-add is slow. Partitions under sharding like the histogram.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.methods.selection.keys import flat_index

Keys = Callable[[Array], Array]
Route = Literal["histogram", "blocks", "bisection"]

_ROW = 256
_BLOCK = _ROW**2
_LARGE = 1 << 18
"""From this size on, few wide digits are faster than many narrow ones."""


def by_platform(kernel: Callable[..., Any], *args: Any, accelerator: Route = "bisection") -> Any:
    """Runs `kernel(*args, route=...)` by the route that suits the platform it is compiled for."""
    # With one device nothing can be sharded, so the loop over blocks is safe.
    cpu: Route = "blocks" if jax.device_count() == 1 else "histogram"
    return jax.lax.platform_dependent(
        *args,
        cpu=functools.partial(kernel, route=cpu),
        default=functools.partial(kernel, route=accelerator),
    )


def kth_largest(
    groups: Sequence[Array], keys_of: Keys, k: Array, width: int, route: Route
) -> tuple[Array, Array]:
    """The k-th largest key of all groups together.

    Args:
        groups: Arrays of values, of any shapes.
        keys_of: Elementwise map from values to uint32 keys below 2**width.
        k: uint32 scalar, at most the number of values.
        width: The bits of a key.
        route: How to count.

    Returns:
        uint32 scalars: the key, and how many of the entries equal to it belong to the k largest.
        For k = 0 a key above every other, and 0.
    """

    size = sum(values.size for values in groups)
    bits = 4 if route == "bisection" else 16 if size >= _LARGE else 8
    digits = -(-width // bits)

    def enter(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        prefix, k = state
        shift = ((digits - 1 - i) * bits).astype(jnp.uint32)
        counts = jnp.zeros(1 << bits, jnp.uint32)
        for values in groups:
            counts = counts + digit_counts(values, keys_of, prefix, shift, bits, route)
        digit, k = enter_digit(counts, k, route)
        return (prefix << bits) | digit, k

    # A loop, not unrolled: one digit's program is compiled, not eight.
    return jax.lax.fori_loop(0, digits, enter, (jnp.uint32(0), k))


def nth_equal(values: Array, keys_of: Keys, threshold: Array, m: Array, route: Route) -> Array:
    """The flat index of the m-th entry (from 1) whose key is the threshold, as int32; -1 for m = 0.

    `m` is at most the number of such entries.
    """
    if route != "blocks":
        index = _nth_true(keys_of(values) == threshold, m, route)
    elif values.size <= _BLOCK:
        index = _nth_true_of_few(keys_of(values.reshape(-1)) == threshold, m)
    else:
        index = _nth_equal_in_blocks(values.reshape(-1), keys_of, threshold, m)
    return jnp.where(m == 0, jnp.int32(-1), index)


def digit_counts(
    values: Array,
    keys_of: Keys,
    prefix: Array,
    shift: Array,
    bits: int,
    route: Route,
) -> Array:
    """How often each digit occurs among the keys with a prefix, as uint32 [2**bits].

    The digit is bits shift..shift+bits of the key, the prefix what stands above them.
    """

    def digit(part: Array) -> Array:
        return _digit(keys_of(part), prefix, shift, bits)

    if route == "bisection":
        return _compare_counts(digit(values), bits)
    counts = jnp.zeros(1 << bits, jnp.uint32)
    if route == "histogram":
        return _scatter(counts, digit(values))
    flat = values.reshape(-1)
    blocks = flat.size // _BLOCK

    def add(i: Array, counts: Array) -> Array:
        block = jax.lax.dynamic_slice(flat, (i * _BLOCK,), (_BLOCK,))
        return _scatter(counts, digit(block))

    if blocks:
        counts = jax.lax.fori_loop(0, blocks, add, counts)
    rest = flat[blocks * _BLOCK :]
    return _scatter(counts, digit(rest)) if rest.size else counts


def enter_digit(counts: Array, k: Array, route: Route) -> tuple[Array, Array]:
    """The digit in which the k-th largest entry lies, and its rank among that digit's entries."""
    if counts.size > _ROW:
        rows = counts.reshape(-1, _ROW)
        row, k = enter_digit(jnp.sum(rows, axis=1, dtype=jnp.uint32), k, route)
        digit, k = enter_digit(rows[row], k, route)
        return row * _ROW + digit, k
    return (_compare_sums if route == "bisection" else _walk_down)(counts, k)


def _walk_down(counts: Array, k: Array) -> tuple[Array, Array]:
    # Step by step: the smallest program to compile, and 256 steps of a CPU are nothing.
    def beyond(state: tuple[Array, Array]) -> Array:
        digit, above = state
        return above + counts[digit] < k

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        digit, above = state
        return digit - 1, above + counts[digit]

    start = (jnp.uint32(counts.size - 1), jnp.uint32(0))
    digit, above = jax.lax.while_loop(beyond, step, start)
    return digit, k - above


def _compare_sums(counts: Array, k: Array) -> tuple[Array, Array]:
    digits = jnp.arange(counts.size)
    from_here = digits[None, :] >= digits[:, None]
    at_least = jnp.sum(jnp.where(from_here, counts[None, :], 0), axis=1, dtype=jnp.uint32)
    # These fall with the digit; for k = 0 the highest digit is entered.
    digit = jnp.sum(at_least >= k, dtype=jnp.uint32) - 1
    return digit, k - (at_least[digit] - counts[digit])


def _digit(keys: Array, prefix: Array, shift: Array, bits: int) -> Array:
    """The digit of the keys that have the prefix, and 2**bits, which is no digit, of the others."""
    rest = keys >> shift
    # Two shifts: one by all 32 bits would be undefined.
    return jnp.where(rest >> bits == prefix, rest & ((1 << bits) - 1), jnp.uint32(1 << bits))


def _scatter(counts: Array, digit: Array) -> Array:
    return counts.at[digit].add(jnp.uint32(1), mode="drop")


def _compare_counts(digit: Array, bits: int) -> Array:
    # One reduction of many operands: the data are read once, whatever the compiler fuses.
    operands = tuple((digit == value).astype(jnp.uint32) for value in range(1 << bits))
    zeros = (jnp.uint32(0),) * len(operands)
    return jnp.stack(jax.lax.reduce(operands, zeros, _add, tuple(range(digit.ndim))))


def _add(a: Sequence[Array], b: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _nth_true(mask: Array, m: Array, route: Route) -> Array:
    # The first true entry has the largest key, false ones the smallest: 0.
    keys = jnp.where(mask, mask.size - flat_index(mask.shape), 0).astype(jnp.uint32)
    key, _ = kth_largest([keys], _same, m, mask.size.bit_length(), route)
    return mask.size - key.astype(jnp.int32)


def _nth_true_of_few(mask: Array, m: Array) -> Array:
    """The index of the m-th true entry of at most _ROW**2."""
    rest = -mask.size % _ROW
    backwards = jnp.flip(jnp.pad(mask, (0, rest))).astype(jnp.uint32)
    return mask.size + rest - 1 - enter_digit(backwards, m, "blocks")[0].astype(jnp.int32)


def _nth_equal_in_blocks(flat: Array, keys_of: Keys, threshold: Array, m: Array) -> Array:
    blocks = flat.size // _BLOCK

    def equal(start: Array) -> Array:
        return keys_of(jax.lax.dynamic_slice(flat, (start,), (_BLOCK,))) == threshold

    def too_few(state: tuple[Array, Array, Array]) -> Array:
        block, _, upto = state
        return (upto < m) & (block < blocks)

    def add(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        block, _, upto = state
        return block + 1, upto, upto + jnp.sum(equal(block * _BLOCK), dtype=jnp.uint32)

    start = (jnp.int32(0), jnp.uint32(0), jnp.uint32(0))
    block, before, upto = jax.lax.while_loop(too_few, add, start)
    first = jnp.where(upto < m, blocks, block - 1) * _BLOCK
    before = jnp.where(upto < m, upto, before)
    # A shorter last block is searched as the one that ends with the array.
    begin = jnp.minimum(first, flat.size - _BLOCK)
    mask = equal(begin) & (begin + jnp.arange(_BLOCK) >= first)
    return begin + _nth_true_of_few(mask, m - before)


def _same(keys: Array) -> Array:
    return keys
