"""What the oracles take: float64 arrays, and one number for all models or one for each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Numbers = float | Sequence[float] | NDArray[Any]
Tensors = dict[str, Array]


def f64(x: ArrayLike) -> Array:
    """`x` as a float64 array."""
    return np.asarray(x, dtype=np.float64)


def per_model(value: Numbers, n: int) -> Array:
    """`value` as [n]: a scalar is the same for every model."""
    array = f64(value)
    if array.ndim > 0 and array.shape != (n,):
        raise ValueError(f"expected a number or {n} numbers, got shape {array.shape}")
    return np.broadcast_to(array, (n,)).copy()
