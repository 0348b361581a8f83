"""Multi-head attention between linear maps, as encoders have it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models.attention import attend
from jaxmerge.models.linear import dense, layer_norm


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
        mixed = attend(query, key, value, mask, scale=scale, bias=bias)
        joined = mixed.reshape(*mixed.shape[:2], size)
        return nn.Dense(x.shape[-1], use_bias=self.output_bias, dtype=self.dtype, name="output")(
            joined
        )

    def _linear(self, size: int, name: str) -> nn.Dense:
        return dense(size, self.dtype, bias=self.bias, name=name)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_size)
