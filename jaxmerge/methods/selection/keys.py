"""Monotone integer keys of nonnegative floats, and the selection that they define."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

LARGEST_INDEX = 2**31 - 1

_FLOAT32 = np.dtype(jnp.float32)
_BFLOAT16 = np.dtype(jnp.bfloat16)
_NAN = 0x7F800001


class Selection(NamedTuple):
    """Which entries of one tensor are kept: the key above `threshold`, or equal to it up to `cut`.

    Attributes:
        threshold: uint32 scalar, the key (`key_bits`) of the smallest kept value. Where nothing is
            kept by value, a key above every other.
        cut: int32 scalar, the flat index of the last kept entry among those whose key equals the
            threshold; -1 if none of them is kept.
    """

    threshold: Array | np.unsignedinteger
    cut: Array | np.signedinteger


class _Format(NamedTuple):
    unsigned: type
    width: int
    infinity: int


_FORMATS = {
    _FLOAT32: _Format(np.uint32, 31, 0x7F800000),
    _BFLOAT16: _Format(np.uint16, 15, 0x7F80),
    np.dtype(jnp.float16): _Format(np.uint16, 15, 0x7C00),
}


def key_format(dtype: np.dtype) -> _Format:
    """The unsigned type, the bits of a key and the key of infinity of a floating type.

    Raises:
        TypeError: If the type is not float32, bfloat16 or float16.
    """
    found = _FORMATS.get(np.dtype(dtype))
    if found is None:
        raise TypeError(f"float32, bfloat16 or float16 values were expected, found {dtype}")
    return found


def key_bits(values: Array) -> Array:
    """Maps floats to unsigned keys in the order of their magnitudes.

    The key is the bit pattern without its sign. All NaNs share one key, just above infinity's.

    Args:
        values: float32, bfloat16 or float16 array of any shape.

    Returns:
        uint32 array of the same shape; below 2**31 for float32, below 2**15 for 16-bit types.

    Example:
        >>> [hex(key) for key in key_bits(jnp.array([0.0, -1.0, jnp.inf, jnp.nan])).tolist()]
        ['0x0', '0x3f800000', '0x7f800000', '0x7f800001']
    """
    unsigned, width, infinity = key_format(values.dtype)
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(values), unsigned)
    # The mask is a NumPy scalar of the narrow type: 16-bit data stay 16 bits wide until the end.
    return jnp.minimum(bits & unsigned((1 << width) - 1), unsigned(infinity + 1)).astype(jnp.uint32)


def flat_index(shape: tuple[int, ...]) -> Array:
    """int32 row-major flat indices of an array, made without a reshape.

    Example:
        >>> flat_index((2, 3)).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    index = jnp.zeros(shape, jnp.int32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = index + jax.lax.broadcasted_iota(jnp.int32, shape, axis) * jnp.int32(stride)
        stride *= shape[axis]
    return index


def keep(values: Array, selection: Selection, index: Array | None = None) -> Array:
    """The mask of a selection.

    Args:
        values: The float32, bfloat16 or float16 values that were selected from, or a part of them.
        selection: What to keep.
        index: int32 or uint32 flat indices in the whole tensor, of the values' shape; by default
            the values are the whole tensor.

    Returns:
        bool array of the values' shape.

    Example:
        >>> keep(jnp.array([2.0, 1.0, 1.0]), Selection(key_bits(jnp.float32(1)), jnp.int32(1)))
        Array([ True,  True, False], dtype=bool)
    """
    return _keep(values, selection, index)


def common_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The type whose keys compare values of all these types: theirs, or float32 if they differ."""
    for dtype in dtypes:
        key_format(dtype)
    return np.dtype(dtypes[0]) if len({np.dtype(d) for d in dtypes}) == 1 else _FLOAT32


def keys_as(dtype: np.dtype) -> Callable[[Array], Array]:
    """The map from values, of this type or a narrower one, to keys of this type."""

    def keys_of(values: Array) -> Array:
        keys = key_bits(values)
        return keys if values.dtype == dtype else _widened(keys, values.dtype)

    return keys_of


def narrowed(
    threshold: Array | np.unsignedinteger, source: np.dtype, target: np.dtype
) -> Array | np.unsignedinteger:
    """The largest key of the target type that is not above a key of the source type."""
    if np.dtype(source) == np.dtype(target):
        return threshold
    _, width, infinity = key_format(target)
    if np.dtype(target) == _BFLOAT16:
        key = threshold >> 16
    else:
        value = jax.lax.bitcast_convert_type(threshold, jnp.float32)
        key = key_bits(value.astype(target))
        key = key - (_widened(key, target) > threshold).astype(jnp.uint32)
    key = jnp.where(threshold == _NAN, jnp.uint32(infinity + 1), key)
    # A threshold above every key stays one.
    return jnp.where(threshold > _NAN, jnp.uint32((1 << width) - 1), key)


def narrowed_to(
    threshold: Array | np.unsignedinteger, source: np.dtype, values: Sequence[Array | np.ndarray]
) -> dict[str, Array | np.unsignedinteger]:
    """A threshold as a key of each type that the values have, by the type's name."""
    return {dtype.name: narrowed(threshold, source, dtype) for dtype in {v.dtype for v in values}}


def alike(values: Sequence[Array]) -> list[list[int]]:
    """The places of the arrays of each shape and type: what can be stacked."""
    places: dict[tuple[tuple[int, ...], np.dtype], list[int]] = {}
    for i, v in enumerate(values):
        places.setdefault((v.shape, v.dtype), []).append(i)
    return list(places.values())


def regrouping(places: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Index arrays from the given order to the groups' one after another, and back."""
    grouped = np.array([i for same in places for i in same])
    return grouped, np.argsort(grouped)


def entries(array: Array) -> list[Array]:
    """The entries of a 1-D array, by one small program however many there are."""
    # The index is an operand: a static one would compile a program for each entry.
    return [
        jax.lax.dynamic_index_in_dim(array, np.int32(i), keepdims=False) for i in range(array.size)
    ]


def nothing(dtype: np.dtype) -> Selection:
    """The selection that keeps nothing: its threshold is above every key."""
    return Selection(jnp.uint32((1 << key_format(dtype).width) - 1), jnp.int32(-1))


def clipped_count(k: ArrayLike, size: int) -> Array | np.ndarray:
    """`k` limited to 0..size as uint32; a NumPy array if it is concrete."""
    if isinstance(k, jax.core.Tracer):
        if jnp.issubdtype(k.dtype, jnp.signedinteger):
            k = jnp.maximum(k, 0)
        return jnp.minimum(k.astype(jnp.uint32), jnp.uint32(size))
    k = np.asarray(k)
    if not np.issubdtype(k.dtype, np.integer):
        raise TypeError(f"an integer count k was expected, found {k.dtype}")
    return np.asarray(np.clip(k.astype(np.int64), 0, size), np.uint32)


def checked_size(shape: tuple[int, ...]) -> int:
    """The number of entries of one tensor.

    Raises:
        ValueError: If a flat index would not fit int32.
    """
    size = math.prod(shape)
    if size > LARGEST_INDEX:
        raise ValueError(f"a tensor of at most 2**31 - 1 entries was expected, found shape {shape}")
    return size


def checked_total(shapes: Sequence[tuple[int, ...]]) -> int:
    """The number of entries of several tensors.

    Raises:
        ValueError: If the counts would not fit uint32.
    """
    total = sum(checked_size(shape) for shape in shapes)
    if total > 2**32 - 1:
        raise ValueError(
            f"at most 2**32 - 1 entries in all tensors together were expected, found {total}: "
            "select per tensor instead"
        )
    return total


@jax.jit
def _keep(values: Array, selection: Selection, index: Array | None) -> Array:
    keys = key_bits(values)
    index = flat_index(values.shape) if index is None else index.astype(jnp.int32)
    threshold = jnp.asarray(selection.threshold, jnp.uint32)
    cut = jnp.asarray(selection.cut, jnp.int32)
    return (keys > threshold) | ((keys == threshold) & (index <= cut))


def _widened(keys: Array, dtype: np.dtype) -> Array:
    """The float32 keys of 16-bit floats, given by their keys."""
    if np.dtype(dtype) == _BFLOAT16:
        # By shifts, not by a float conversion: that may flush subnormal numbers.
        return jnp.minimum(keys << 16, jnp.uint32(_NAN))
    bits = keys.astype(key_format(dtype).unsigned)
    return key_bits(jax.lax.bitcast_convert_type(bits, dtype).astype(jnp.float32))
