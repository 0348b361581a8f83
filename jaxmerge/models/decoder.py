"""The decoder of Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3 and SmolLM 2 and 3: one definition with switches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models.activations import ACTIVATIONS
from jaxmerge.models.attention import attend
from jaxmerge.models.causal import CausalLM, LayerCache, Places, remember
from jaxmerge.models.linear import precision_of
from jaxmerge.models.rotary import Rotary, rotate, rotations


@dataclass(frozen=True)
class LayerKind:
    """How a layer's attention sees positions.

    Attributes:
      window: it reads that many tokens back, its own included; None: all.
      rotary: None: no position embedding.
    """

    window: int | None = None
    rotary: Rotary | None = field(default_factory=Rotary)


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and switches of a decoder.

    Attributes:
      vocabulary_size: number of token ids.
      width: of the hidden states.
      layers: one kind per layer.
      heads: query heads.
      key_heads: heads of keys and values; divides `heads`.
      head_width: even; `heads * head_width` need not be `width`.
      mlp_width: of the gated MLP.
      context_length: positions that the model was trained for; nothing stops longer inputs.
      activation: of the MLP's gate, a key of `ACTIVATIONS`.
      norm_epsilon: of the RMS norms.
      norm_offset: added to the norms' scales (Gemma: 1).
      attention_bias: biases of queries, keys and values.
      output_bias: bias of the attention's output.
      mlp_bias: biases of the MLP.
      query_key_norm: RMS norms of each head's queries and keys.
      output_norms: RMS norms of what attention and MLP add to the hidden states (Gemma 2 and 3).
      scale_embedding: embeddings are multiplied by sqrt(width).
      score_width: attention scores are divided by its square root; None: `head_width`.
      attention_softcap: bounds the scores; see `attend`.
      logits_softcap: bounds the logits likewise.
      tied: the head is the transposed embedding.
      dtype: of computation, "float32" or "bfloat16".
      stacked: parameters hold all layers on axis 0, under `layers`, and the layers run in one `lax.scan`.
    """

    vocabulary_size: int
    width: int
    layers: tuple[LayerKind, ...]
    heads: int
    key_heads: int
    head_width: int
    mlp_width: int
    context_length: int = 2048
    activation: str = "silu"
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    output_norms: bool = False
    scale_embedding: bool = False
    score_width: int | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    tied: bool = False
    dtype: str = "float32"
    stacked: bool = False

    per_layer: ClassVar[tuple[str, ...]] = ("layers",)

    def __post_init__(self) -> None:
        if self.heads % self.key_heads:
            raise ValueError(f"{self.key_heads} key heads do not divide {self.heads} query heads")
        if self.head_width % 2:
            raise ValueError(f"rotary embeddings need an even head width, found {self.head_width}")

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The distinct kinds, in order of first appearance."""
        return tuple(dict.fromkeys(self.layers))

    @property
    def layer_kinds(self) -> tuple[int, ...]:
        """Each layer's index in `kinds`."""
        return tuple(map(self.kinds.index, self.layers))

    def of_layers(self, origins: Sequence[tuple["DecoderConfig", int]]) -> "DecoderConfig":
        """The configuration of a model of other layers, each given by the model that it comes from and its number."""
        return replace(self, layers=tuple(config.layers[layer] for config, layer in origins))


class Contexts(NamedTuple):
    """What layers of each kind read beside the hidden states; axis 0 runs over the kinds.

    Attributes:
      visible: bool [kinds, batch or 1, length, slots].
      cosine: float32 [kinds, batch or 1, length, head_width / 2].
      sine: likewise.
    """

    visible: jax.Array
    cosine: jax.Array
    sine: jax.Array


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon), times (scale + offset), in float32 or wider."""

    epsilon: float
    offset: float
    dtype: str

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        initial = nn.initializers.constant(1 - self.offset)
        wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
        scale = self.param("scale", initial, (hidden.shape[-1],)).astype(wide.dtype) + self.offset
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = scale.reshape((1,) * (hidden.ndim - 1) + scale.shape)
        return (wide * jax.lax.rsqrt(mean + self.epsilon) * scale).astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        context: Contexts,
        cache: LayerCache | None,
        start: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        config = self.config
        query = self._heads("query", config.heads, hidden)
        key = self._heads("key", config.key_heads, hidden)
        value = self._heads("value", config.key_heads, hidden)
        if config.query_key_norm:
            query, key = _norm(config, "query_norm")(query), _norm(config, "key_norm")(key)
        query = rotate(query, context.cosine, context.sine).astype(config.dtype)
        key = rotate(key, context.cosine, context.sine).astype(config.dtype)
        key, value, cache = remember(cache, key, value, start)
        read = attend(
            query,
            key,
            value,
            context.visible,
            scale=1 / math.sqrt(config.score_width or config.head_width),
            softcap=config.attention_softcap,
        )
        joined = read.reshape(*read.shape[:2], -1)
        return _dense(config, config.width, config.output_bias, "output")(joined), cache

    def _heads(self, name: str, heads: int, hidden: jax.Array) -> jax.Array:
        width = self.config.head_width
        flat = _dense(self.config, heads * width, self.config.attention_bias, name)(hidden)
        return flat.reshape(*hidden.shape[:2], heads, width)


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        config = self.config
        gate = _dense(config, config.mlp_width, config.mlp_bias, "gate")(hidden)
        up = _dense(config, config.mlp_width, config.mlp_bias, "up")(hidden)
        gated = ACTIVATIONS[config.activation](gate) * up
        return _dense(config, config.width, config.mlp_bias, "down")(gated)


class DecoderLayer(nn.Module):
    """Attention and MLP, each on normalised hidden states and added to them."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        kind: int | jax.Array,
        contexts: Contexts,
        cache: LayerCache | None,
        start: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        config = self.config
        # Alone of its kind, it is read at a known place: nothing is gathered.
        kind = 0 if len(config.kinds) == 1 else kind
        context: Contexts = jax.tree.map(lambda leaf: leaf[kind], contexts)
        normed = _norm(config, "attention_norm")(hidden)
        added, cache = Attention(config, name="attention")(normed, context, cache, start)
        if config.output_norms:
            added = _norm(config, "attention_output_norm")(added)
        hidden = hidden + added
        added = MLP(config, name="mlp")(_norm(config, "mlp_norm")(hidden))
        if config.output_norms:
            added = _norm(config, "mlp_output_norm")(added)
        return hidden + added, cache


class Decoder(CausalLM):
    """The causal language model of a `DecoderConfig`.

    Example:
      >>> config = DecoderConfig(
      ...     vocabulary_size=50, width=16, layers=(LayerKind(),), heads=4, key_heads=2, head_width=4, mlp_width=32
      ... )
      >>> tokens = jnp.ones((2, 3), jnp.int32)
      >>> params = jax.jit(Decoder(config).init)(jax.random.key(0, impl="rbg"), tokens)
      >>> jax.jit(Decoder(config).apply)(params, tokens).shape
      (2, 3, 50)
    """

    config: DecoderConfig
    layer = DecoderLayer

    def final_norm(self) -> nn.Module:
        return RMSNorm(self.config.norm_epsilon, self.config.norm_offset, self.config.dtype)

    def contexts(self, places: Places) -> Contexts:
        kinds, width = self.config.kinds, self.config.head_width
        turns = [rotations(kind.rotary, places.positions, width) for kind in kinds]
        return Contexts(
            jnp.stack([places.visible(kind.window) for kind in kinds]),
            jnp.stack([cosine for cosine, _ in turns]),
            jnp.stack([sine for _, sine in turns]),
        )

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        hidden = self.token_embedding(tokens)
        if self.config.scale_embedding:
            hidden = hidden * jnp.asarray(math.sqrt(self.config.width), hidden.dtype)
        return hidden

    def logits(self, hidden: jax.Array) -> jax.Array:
        logits = super().logits(hidden)
        cap = self.config.logits_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _dense(config: DecoderConfig, features: int, bias: bool, name: str) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        precision=precision_of(config.dtype),
        name=name,
    )


def _norm(config: DecoderConfig, name: str) -> RMSNorm:
    return RMSNorm(config.norm_epsilon, config.norm_offset, config.dtype, name=name)
