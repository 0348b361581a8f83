"""How many entries a density keeps: density times size, exact, whether concrete or traced."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

LARGEST = 2**32 - 1
"""The largest size that is counted: counts are uint32."""

_ONE = 0x3F800000


def count(
    density: ArrayLike, size: int | Array, *, rounding: Literal["floor", "ceil"] = "floor"
) -> Array | np.ndarray:
    r"""Counts the entries that a density keeps, :math:`\lfloor density \cdot size \rfloor`.

    One rule holds for both routes: the product is rounded once to double precision, as Python
    does, so that the count is ``int(density * size)``; up to sizes of 2**29 that is the floor of
    the exact product. A concrete density is multiplied in float64 on the host. A traced one is a
    float32 number, multiplied in integers: it gives the count of *its* value, so that 0.7 traced
    (0.699999988 in float32) keeps 6 of 10 where the Python float 0.7 keeps 7. A float32 number
    gives the same count by both routes.

    Args:
        density: The kept fraction, any shape; values outside [0, 1] are clipped, NaN counts as 0.
        size: The number of entries, at most 2**32 - 1; a Python int, or a traced integer scalar.
        rounding: "floor", or "ceil" for :math:`\lceil density \cdot size \rceil`.

    Returns:
        uint32 array of the density's shape; a NumPy array where both arguments are concrete.

    Raises:
        ValueError: If `size` is negative or above 2**32 - 1, or `rounding` is unknown.

    Example:
        >>> int(count(0.7, 10)), int(count(0.7, 10, rounding="ceil")), int(count(0.29, 100))
        (7, 7, 28)
        >>> jax.jit(lambda d: count(d, 10))(jnp.array([0.0, 0.25, 1.0])).tolist()
        [0, 2, 10]
    """
    if rounding not in ("floor", "ceil"):
        raise ValueError(f'rounding is "floor" or "ceil", found {rounding!r}')
    if not isinstance(size, jax.core.Tracer):
        size = int(size)
        if not 0 <= size <= LARGEST:
            raise ValueError(f"a size from 0 to 2**32 - 1 was expected, found {size}")
        if not isinstance(density, jax.core.Tracer):
            return _count_concrete(np.asarray(density, np.float64), size, rounding)
    density = jnp.asarray(density)
    if density.dtype == jnp.float64:
        return _count_double(density, size, rounding)
    return _count_traced(density.astype(jnp.float32), size, rounding)


def _count_concrete(density: np.ndarray, size: int, rounding: str) -> np.ndarray:
    # NaN is replaced before the clip: it would survive it.
    product = np.clip(np.where(np.isnan(density), 0.0, density), 0.0, 1.0) * size
    return np.asarray(getattr(np, rounding)(product)).astype(np.uint32)


def _count_double(density: Array, size: int | Array, rounding: str) -> Array:
    product = jnp.clip(jnp.where(jnp.isnan(density), 0.0, density), 0.0, 1.0) * jnp.asarray(
        size, jnp.float64
    )
    return (jnp.floor(product) if rounding == "floor" else jnp.ceil(product)).astype(jnp.uint32)


def _count_traced(density: Array, size: int | Array, rounding: str) -> Array:
    bits = jax.lax.bitcast_convert_type(density, jnp.uint32)
    # Clipped as bits, because a float clip may flush subnormal numbers. Negative, NaN: nothing.
    bits = jnp.where(bits > 0x7F800000, jnp.uint32(0), jnp.minimum(bits, jnp.uint32(_ONE)))
    exponent = bits >> 23
    mantissa = jnp.where(exponent == 0, jnp.uint32(0), jnp.uint32(1 << 23)) | (bits & 0x7FFFFF)
    # The density is mantissa / 2**scale with a scale of at least 23.
    scale = 150 - jnp.maximum(exponent, jnp.uint32(1))
    high, low = _round_to_double(*_multiply(mantissa, jnp.asarray(size, jnp.uint32)))
    quotient, rest = _shift_right(high, low, scale)
    return quotient + rest if rounding == "ceil" else quotient


def _multiply(a: Array, b: Array) -> tuple[Array, Array]:
    """The 64-bit product of two uint32 numbers as (high, low) words."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    lowest, first, second = a_low * b_low, a_low * b_high, a_high * b_low
    middle = (lowest >> 16) + (first & 0xFFFF) + (second & 0xFFFF)
    high = a_high * b_high + (first >> 16) + (second >> 16) + (middle >> 16)
    return high, (middle << 16) | (lowest & 0xFFFF)


def _round_to_double(high: Array, low: Array) -> tuple[Array, Array]:
    """Rounds a product of at most 56 bits to 53, halves to even: what float64 would hold."""
    length = 64 - jax.lax.clz(high)
    dropped = jnp.where(high == 0, jnp.uint32(0), jnp.maximum(length, jnp.uint32(53)) - 53)
    half = jnp.where(dropped == 0, jnp.uint32(0), jnp.uint32(1) << jnp.maximum(dropped, 1) - 1)
    odd = (low >> dropped) & 1
    increment = jnp.where(dropped == 0, jnp.uint32(0), half - 1 + odd)
    rounded = low + increment
    high = high + (rounded < low).astype(jnp.uint32)
    return high, (rounded >> dropped) << dropped


def _shift_right(high: Array, low: Array, by: Array) -> tuple[Array, Array]:
    """(high, low) >> by for 1 <= by, and 1 where a bit that is lost was set."""
    inside = jnp.minimum(by, jnp.uint32(31))
    beyond = jnp.clip(by, jnp.uint32(32), jnp.uint32(63)) - 32
    short = (high << (32 - inside)) | (low >> inside)
    lost_short = low & ((jnp.uint32(1) << inside) - 1)
    lost_long = low | (high & ((jnp.uint32(1) << beyond) - 1))
    quotient = jnp.where(by < 32, short, high >> beyond)
    lost = jnp.where(by < 32, lost_short, lost_long)
    return quotient, (lost != 0).astype(jnp.uint32)
