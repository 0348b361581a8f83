"""Ranks of values within rows: by a sort of packed keys on the host, by sorting in a compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.methods.selection.host import is_on_host, ranks_on_host


def ranks_within_rows(values: Array) -> Array:
    """The rank of each value within its row, from 0 for the smallest to 1 for the largest.

    Args:
        values: Nonnegative float32 [..., entries].

    Returns:
        float32, same shape; of equal values the lower index ranks above; 1/2 for an entry alone in its row.

    Example:
        >>> ranks_within_rows(jnp.array([[5.0, 1.0, 1.0], [0.0, 2.0, 1.0]]))
        Array([[1. , 0.5, 0. ],
               [0. , 1. , 0.5]], dtype=float32)
    """
    entries = values.shape[-1]
    if entries == 1:
        return jnp.full(values.shape, 0.5, jnp.float32)
    if is_on_host(values):
        return jnp.asarray(ranks_on_host(np.asarray(values)))
    return _ranks_compiled(values)


@jax.jit
def _ranks_compiled(values: Array) -> Array:
    last = values.shape[-1] - 1
    place = jnp.argsort(jnp.argsort(-values, axis=-1, stable=True), axis=-1)
    return (last - place).astype(jnp.float32) / max(last, 1)
