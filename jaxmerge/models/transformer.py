"""Transformer parts that several families share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models.activations import ACTIVATIONS
from jaxmerge.models.linear import dense, layer_norm
from jaxmerge.models.multi_head import Attention


class FeedForward(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x)).

    Attributes:
      hidden_size: features between the linear maps.
      activation: a key of `ACTIVATIONS`.
      gated: a map "gate" goes through the activation function, and its result multiplies that of "up".
      bias: the maps have biases.
      dtype: of the computation.
    """

    hidden_size: int
    activation: str
    gated: bool = False
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., features] -> [..., features]."""
        act, up = ACTIVATIONS[self.activation], self._linear(self.hidden_size, "up")
        hidden = (
            act(self._linear(self.hidden_size, "gate")(x)) * up(x) if self.gated else act(up(x))
        )
        return self._linear(x.shape[-1], "down")(hidden)

    def _linear(self, size: int, name: str) -> nn.Dense:
        return dense(size, self.dtype, bias=self.bias, name=name)


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Attributes:
      num_heads: attention heads; they share the features evenly.
      hidden_size: features inside the feed-forward part.
      activation: a key of `ACTIVATIONS`.
      norm_eps: epsilon of the norms.
      qkv_bias: the maps to queries, keys and values have biases.
      fused_qkv: they are one map.
      qk_norm: queries and keys are normalised over each head.
      layer_scale: what each part adds is multiplied by a learned vector.
      dtype: of the computation.
    """

    num_heads: int
    hidden_size: int
    activation: str
    norm_eps: float
    qkv_bias: bool = True
    fused_qkv: bool = False
    qk_norm: bool = False
    layer_scale: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[batch, length, features] -> the same; `mask` as for `attend`."""
        attention = Attention(
            num_heads=self.num_heads,
            head_size=x.shape[-1] // self.num_heads,
            bias=self.qkv_bias,
            fused=self.fused_qkv,
            norm_eps=self.norm_eps if self.qk_norm else None,
            dtype=self.dtype,
            name="attention",
        )
        feed_forward = FeedForward(
            self.hidden_size, self.activation, dtype=self.dtype, name="feed_forward"
        )
        first = attention(layer_norm(self.norm_eps, self.dtype, "attention_norm")(x), mask=mask)
        x = x + self._scaled(first, "attention_scale")
        second = feed_forward(layer_norm(self.norm_eps, self.dtype, "feed_forward_norm")(x))
        return x + self._scaled(second, "feed_forward_scale")

    def _scaled(self, x: jax.Array, name: str) -> jax.Array:
        if not self.layer_scale:
            return x
        scale = self.param(name, nn.initializers.ones, (x.shape[-1],))
        return x * scale[None, None].astype(self.dtype)
