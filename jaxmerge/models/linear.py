"""Linear maps and layer norms of transformers, as exact as the dtype of the computation allows."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """Products of a float32 model are float32 on accelerators too, which default to less."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def dense(features: int, dtype: Any, *, bias: bool = True, name: str | None = None) -> nn.Dense:
    """A linear map of the last axis to so many features."""
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=jnp.dtype(dtype),
        precision=precision_of(dtype),
        name=name,
    )


def layer_norm(eps: float, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """A layer norm over the last axis whose variance is exact: E[(x - E x)^2], not E[x^2] - (E x)^2."""
    return nn.LayerNorm(epsilon=eps, dtype=jnp.dtype(dtype), use_fast_variance=False, name=name)
