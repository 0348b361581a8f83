"""Selections for a sweep: sort the magnitudes once, then look each count up."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.methods.selection.host import is_on_host, order_on_host
from jaxmerge.methods.selection.keys import checked_size, key_bits


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


@jax.jit
def _order_compiled(values: Array) -> Array:
    keys = ~key_bits(values).reshape(-1)
    index = jnp.arange(keys.size, dtype=jnp.int32)
    return jax.lax.sort((keys, index), num_keys=1, is_stable=True)[1]
