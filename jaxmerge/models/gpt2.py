"""GPT-2: learned positions, layer norms, one projection for queries, keys and values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models.activations import ACTIVATIONS
from jaxmerge.models.attention import attend
from jaxmerge.models.causal import CausalLM, LayerCache, Places, remember
from jaxmerge.models.linear import precision_of


@dataclass(frozen=True)
class GPT2Config:
    """Shape of a GPT-2.

    Attributes:
      vocabulary_size: number of token ids.
      context_length: number of learned positions.
      width: of the hidden states; a multiple of `heads`.
      depth: number of layers.
      heads: attention heads.
      mlp_width: of the MLP's hidden layer.
      activation: of the MLP, a key of `ACTIVATIONS`.
      norm_epsilon: of the layer norms.
      scale_attention: scores are divided by sqrt(head width).
      scale_by_layer: scores are also divided by the layer's number, from 1.
      tied: the head is the transposed token embedding.
      dtype: of computation, "float32" or "bfloat16".
      stacked: parameters hold all layers on axis 0, under `layers`, and the layers run in one `lax.scan`.
    """

    vocabulary_size: int
    context_length: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str = "gelu_tanh"
    norm_epsilon: float = 1e-5
    scale_attention: bool = True
    scale_by_layer: bool = False
    tied: bool = True
    dtype: str = "float32"
    stacked: bool = False

    per_layer: ClassVar[tuple[str, ...]] = ("depth",)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.width}")

    @property
    def key_heads(self) -> int:
        """Heads of keys and values: all."""
        return self.heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def layer_kinds(self) -> tuple[int, ...]:
        """Which scale of the scores each layer reads."""
        return tuple(layer if self.scale_by_layer else 0 for layer in range(self.depth))

    def of_layers(self, origins: Sequence[tuple["GPT2Config", int]]) -> "GPT2Config":
        """The configuration of a model of other layers, each given by the model that it comes from and its number.

        Raises:
          ValueError: `scale_by_layer`: a layer is not the same at another place.
        """
        if self.scale_by_layer:
            raise ValueError("scale_by_layer: a layer is not the same at another place")
        return replace(self, depth=len(origins))


class GPT2Contexts(NamedTuple):
    """What the layers read beside the hidden states.

    Attributes:
      visible: bool [batch or 1, length, slots].
      scale: float32 [kinds], of the attention scores.
    """

    visible: jax.Array
    scale: jax.Array


class Attention(nn.Module):
    """Attention whose queries, keys and values are thirds of one projection."""

    config: GPT2Config

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        visible: jax.Array,
        scale: jax.Array,
        cache: LayerCache | None,
        start: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        config = self.config
        fused = _dense(config, 3 * config.width, "query_key_value")(hidden)
        shape = (*hidden.shape[:2], config.heads, config.head_width)
        query, key, value = (part.reshape(shape) for part in jnp.split(fused, 3, axis=-1))
        key, value, cache = remember(cache, key, value, start)
        read = attend(query, key, value, visible, scale=scale)
        joined = read.reshape(*read.shape[:2], -1)
        return _dense(config, config.width, "output")(joined), cache


class MLP(nn.Module):
    """down(activation(up(x)))."""

    config: GPT2Config

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        config = self.config
        hidden = _dense(config, config.mlp_width, "up")(hidden)
        return _dense(config, config.width, "down")(ACTIVATIONS[config.activation](hidden))


class GPT2Layer(nn.Module):
    """Attention and MLP, each on normalised hidden states and added to them."""

    config: GPT2Config

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        kind: int | jax.Array,
        contexts: GPT2Contexts,
        cache: LayerCache | None,
        start: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        config = self.config
        normed = _norm(config, "attention_norm")(hidden)
        attention = Attention(config, name="attention")
        added, cache = attention(normed, contexts.visible, contexts.scale[kind], cache, start)
        hidden = hidden + added
        return hidden + MLP(config, name="mlp")(_norm(config, "mlp_norm")(hidden)), cache


class GPT2(CausalLM):
    """The causal language model of a `GPT2Config`.

    Example:
      >>> config = GPT2Config(vocabulary_size=50, context_length=8, width=16, depth=1, heads=4, mlp_width=64)
      >>> tokens = jnp.ones((2, 3), jnp.int32)
      >>> params = jax.jit(GPT2(config).init)(jax.random.key(0, impl="rbg"), tokens)
      >>> jax.jit(GPT2(config).apply)(params, tokens).shape
      (2, 3, 50)

    Reference:
      Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
    """

    config: GPT2Config
    layer = GPT2Layer

    def setup(self) -> None:
        super().setup()
        config = self.config
        self.position_embedding = nn.Embed(
            config.context_length, config.width, dtype=jnp.dtype(config.dtype)
        )

    def final_norm(self) -> nn.Module:
        return _norm(self.config, None)

    def contexts(self, places: Places) -> GPT2Contexts:
        slots, length = places.valid.shape[1], self.config.context_length
        if slots > length:
            raise ValueError(f"the model has {length} positions, found {slots} tokens")
        plain = 1 / math.sqrt(self.config.head_width) if self.config.scale_attention else 1.0
        kinds = jnp.arange(1 + max(self.config.layer_kinds), dtype=jnp.float32)
        return GPT2Contexts(places.visible(), plain / (kinds + 1))

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        places = jnp.broadcast_to(positions, tokens.shape)
        return self.token_embedding(tokens) + self.position_embedding(places)


def _dense(config: GPT2Config, features: int, name: str) -> nn.Dense:
    return nn.Dense(
        features,
        dtype=jnp.dtype(config.dtype),
        precision=precision_of(config.dtype),
        name=name,
    )


def _norm(config: GPT2Config, name: str | None) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, cancels.
    return nn.LayerNorm(
        config.norm_epsilon, dtype=jnp.dtype(config.dtype), use_fast_variance=False, name=name
    )
