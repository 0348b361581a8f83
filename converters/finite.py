"""Counting values that are not numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

_CHUNK = 1 << 18
# The bits of infinity as signed and as unsigned numbers: from these on, and from their negatives on, nothing is finite.
_INFINITY = {
    "float64": (np.int64, np.uint64, 0x7FF0_0000_0000_0000),
    "float32": (np.int32, np.uint32, 0x7F80_0000),
    "float16": (np.int16, np.uint16, 0x7C00),
    "bfloat16": (np.int16, np.uint16, 0x7F80),
}


def non_finite(array: Any) -> int:
    """Counts the NaN and infinite elements of an array, chunk by chunk.

    Args:
      array: a NumPy or JAX array of any shape; bfloat16 and the float8 types included.

    Returns:
      How many elements are NaN or infinite; 0 for integers and booleans. A complex element counts
      once.

    Example:
      >>> non_finite(np.array([1.0, np.nan, -np.inf]))
      2
    """
    values = np.asarray(array)
    if values.dtype.kind in "biu" or values.size == 0:
        return 0
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    flat = values.reshape(-1)
    chunks = (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
    if flat.dtype.name in _INFINITY:
        return sum(_of_bits(chunk, *_INFINITY[flat.dtype.name]) for chunk in chunks)
    if flat.dtype.itemsize == 1:
        codes = np.arange(256, dtype=np.uint8).view(flat.dtype).astype(np.float32)
        table = ~np.isfinite(codes)
        return sum(int(np.count_nonzero(table[chunk.view(np.uint8)])) for chunk in chunks)
    return sum(chunk.size - int(np.count_nonzero(np.isfinite(chunk))) for chunk in chunks)


def _of_bits(chunk: np.ndarray, signed: Any, unsigned: Any, infinity: int) -> int:
    """Counts by bits, where the largest of the positive ones and of the negative ones show that there are any."""
    bits, negative = chunk.view(unsigned), infinity | 1 << (8 * chunk.itemsize - 1)
    if int(chunk.view(signed).max()) < infinity and int(bits.max()) < negative:
        return 0
    mask = unsigned(infinity)
    return int(np.count_nonzero((bits & mask) == mask))
