"""Multi-head attention, and the masks that it takes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale * Q K^T + bias) V, per head, the softmax in float32.

    A query that may look nowhere attends evenly to everything: the result is finite.

    Args:
      query: [batch, length, heads, dim].
      key: [batch, memory, heads, dim].
      value: [batch, memory, heads, dim].
      scale: multiplies the scores.
      mask: bool [batch or 1, length or 1, memory]; true where a query may look.
      bias: float [batch or 1, heads, length, memory]; added to the scaled scores.

    Returns:
      [batch, length, heads, dim], of the value's dtype.

    Example:
      >>> ones = jnp.ones((1, 2, 1, 4))
      >>> attend(ones, ones, ones, scale=0.5, mask=causal_mask(2)).shape
      (1, 2, 1, 4)
    """
    scores = jnp.einsum("blhd,bmhd->bhlm", query, key).astype(jnp.float32) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhlm,bmhd->blhd", weights, value)


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or to another one, between four linear maps.

    Attributes:
      num_heads: how many heads.
      head_size: the size of one head.
      scale: multiplies the scores; None for 1 / sqrt(head_size).
      bias: the maps to queries, keys and values have biases.
      output_bias: the map of the result has a bias.
      fused: queries, keys and values come from one map "qkv", in this order, head by head within each.
      norm_eps: queries and keys are normalised over each head (`LayerNorm`), with this epsilon; None for not.
      dtype: of the computation.
    """

    num_heads: int
    head_size: int
    scale: float | None = None
    bias: bool = True
    output_bias: bool = True
    fused: bool = False
    norm_eps: float | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None = None,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          x: [batch, length, features].
          memory: [batch, memory, features], what is attended to; None for `x` itself.
          mask, bias: as for `attend`.

        Returns:
          [batch, length, features].
        """
        memory = x if memory is None else memory
        size = self.num_heads * self.head_size
        if self.fused:
            query, key, value = jnp.split(self._linear(3 * size, "qkv")(x), 3, axis=-1)
        else:
            query = self._linear(size, "query")(x)
            key = self._linear(size, "key")(memory)
            value = self._linear(size, "value")(memory)
        query, key, value = map(self._heads, (query, key, value))
        if self.norm_eps is not None:
            query = layer_norm(self.norm_eps, self.dtype, "query_norm")(query)
            key = layer_norm(self.norm_eps, self.dtype, "key_norm")(key)
        scale = self.head_size**-0.5 if self.scale is None else self.scale
        mixed = attend(query, key, value, scale=scale, mask=mask, bias=bias)
        joined = mixed.reshape(*mixed.shape[:2], size)
        return nn.Dense(x.shape[-1], use_bias=self.output_bias, dtype=self.dtype, name="output")(
            joined
        )

    def _linear(self, size: int, name: str) -> nn.Dense:
        return nn.Dense(size, use_bias=self.bias, dtype=self.dtype, name=name)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_size)


def layer_norm(eps: float, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """A layer norm over the last axis whose variance is exact: E[(x - E x)^2], not E[x^2] - (E x)^2."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


def causal_mask(length: int) -> jax.Array:
    """bool [1, length, length]: a position sees itself and what came before.

    Example:
      >>> causal_mask(2).tolist()
      [[[True, False], [True, True]]]
    """
    return jnp.tril(jnp.ones((1, length, length), bool))


def padding_mask(attention_mask: jax.Array) -> jax.Array:
    """bool [batch, 1, length] of a tokenizer's attention mask [batch, length], which is 0 at padding.

    Example:
      >>> padding_mask(jnp.array([[1, 1, 0]])).tolist()
      [[[True, True, False]]]
    """
    return (attention_mask != 0)[:, None, :]
