"""T5: an encoder and a decoder with relative positions."""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.models.attention import causal_mask, padding_mask
from jaxmerge.models.inputs import named_inputs
from jaxmerge.models.linear import dense, precision_of
from jaxmerge.models.multi_head import Attention
from jaxmerge.models.transformer import FeedForward


@dataclass(frozen=True)
class T5Config:
    """The structure of a T5.

    Attributes:
      vocab_size: token ids.
      hidden_size: features of a position.
      head_size: features of one attention head.
      intermediate_size: features inside the feed-forward part.
      num_layers: blocks of the encoder.
      num_decoder_layers: blocks of the decoder; None for an encoder alone.
      num_heads: attention heads.
      buckets: of relative positions.
      max_distance: beyond it all positions share a bucket.
      norm_eps: epsilon of the norms.
      activation: a key of `ACTIVATIONS`.
      gated: the feed-forward part is gated (T5 1.1).
      tied: logits come from the table of token embeddings.
      scaled: hidden states are divided by sqrt(hidden_size) before the logits.
      dtype: of the computation; the parameters keep their own.
    """

    vocab_size: int
    hidden_size: int
    head_size: int
    intermediate_size: int
    num_layers: int
    num_decoder_layers: int | None
    num_heads: int
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    tied: bool = True
    scaled: bool = True
    dtype: str = "float32"


class T5(nn.Module):
    """A T5: the decoder's logits, or the last hidden state of an encoder alone.

    Reference: Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, JMLR
    2020; Shazeer, GLU Variants Improve Transformer, 2020 (gated).

    Example:
      >>> config = T5Config(
      ...     30, hidden_size=8, head_size=4, intermediate_size=16, num_layers=1, num_decoder_layers=1, num_heads=2
      ... )
      >>> inputs = {"input_ids": jnp.array([[5, 6, 1]]), "decoder_input_ids": jnp.array([[0, 7]])}
      >>> T5(config).apply(T5(config).init(jax.random.key(0), inputs), inputs).shape
      (1, 2, 30)
    """

    config: T5Config

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.token_embedding = nn.Embed(config.vocab_size, config.hidden_size, dtype=dtype)
        self.encoder = T5Stack(config, is_decoder=False)
        if config.num_decoder_layers is not None:
            self.decoder = T5Stack(config, is_decoder=True)
            if not config.tied:
                self.head = dense(config.vocab_size, dtype, bias=False)

    def __call__(self, inputs: Any) -> jax.Array:
        """Encodes, and decodes with the given tokens (teacher forcing).

        Args:
          inputs: a dict of "input_ids" [batch, length] and "decoder_input_ids" [batch, decoder length], perhaps with
            "attention_mask" and "decoder_attention_mask" of the same shapes (0 at padding). For an encoder alone token
            ids, or a dict without the decoder's.

        Returns:
          Logits [batch, decoder length, vocabulary]; of an encoder alone [batch, length, features].
        """
        config = self.config
        if config.num_decoder_layers is None:
            return self.encode(inputs)
        given = named_inputs(
            inputs, ["input_ids", "decoder_input_ids"], ["attention_mask", "decoder_attention_mask"]
        )
        ids, masked = given.pop("decoder_input_ids"), given.pop("decoder_attention_mask", None)
        memory = self.encode(given)
        mask = causal_mask(ids.shape[1])
        if masked is not None:
            mask = mask & padding_mask(masked)
        read = padding_mask(given["attention_mask"]) if "attention_mask" in given else None
        x = self.decoder(self.token_embedding(ids), mask, memory, read)
        if config.scaled:
            x = x * config.hidden_size**-0.5
        if not config.tied:
            return self.head(x)
        table = self.token_embedding.embedding.astype(x.dtype)
        return jnp.matmul(x, table.T, precision=precision_of(x.dtype))

    def encode(self, inputs: Any) -> jax.Array:
        """token ids [batch, length], or a dict with "input_ids" and "attention_mask" -> [batch, length, features]."""
        given = named_inputs(inputs, ["input_ids"], ["attention_mask"])
        mask = padding_mask(given["attention_mask"]) if "attention_mask" in given else None
        return self.encoder(self.token_embedding(given["input_ids"]), mask)


class T5Stack(nn.Module):
    """The encoder's or the decoder's blocks; all share one table of position biases."""

    config: T5Config
    is_decoder: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
    ) -> jax.Array:
        """x [batch, length, features], memory [batch, memory, features] -> [batch, length, features]."""
        config, length = self.config, x.shape[1]
        buckets = relative_buckets(
            length, config.buckets, config.max_distance, both_ways=not self.is_decoder
        )
        table = nn.Embed(config.buckets, config.num_heads, name="position_bias")
        bias = jnp.transpose(table(jnp.asarray(buckets)), (2, 0, 1))[None]
        layers = config.num_decoder_layers if self.is_decoder else config.num_layers
        for i in range(layers or 0):
            x = T5Block(config, name=f"layers_{i}")(x, mask, bias, memory, memory_mask)
        return rms_norm(config, "norm")(x)


class T5Block(nn.Module):
    """Self-attention, cross-attention where there is a memory, and feed-forward, each x + part(norm(x))."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        bias: jax.Array,
        memory: jax.Array | None,
        memory_mask: jax.Array | None,
    ) -> jax.Array:
        """x, memory: [batch, length, features] -> as x; the masks and the bias as for `attend`."""
        config = self.config
        normed = rms_norm(config, "attention_norm")(x)
        x = x + self._attention("attention")(normed, mask=mask, bias=bias)
        if memory is not None:
            normed = rms_norm(config, "cross_attention_norm")(x)
            x = x + self._attention("cross_attention")(normed, memory, mask=memory_mask)
        feed_forward = FeedForward(
            config.intermediate_size,
            config.activation,
            gated=config.gated,
            bias=False,
            dtype=jnp.dtype(config.dtype),
            name="feed_forward",
        )
        return x + feed_forward(rms_norm(config, "feed_forward_norm")(x))

    def _attention(self, name: str) -> Attention:
        return Attention(
            num_heads=self.config.num_heads,
            head_size=self.config.head_size,
            # The initialisation of T5 stands for the usual 1 / sqrt(head_size).
            scale=1.0,
            bias=False,
            output_bias=False,
            dtype=jnp.dtype(self.config.dtype),
            name=name,
        )


def rms_norm(config: T5Config, name: str) -> nn.RMSNorm:
    """x / sqrt(mean x^2 + eps) * scale."""
    return nn.RMSNorm(epsilon=config.norm_eps, dtype=jnp.dtype(config.dtype), name=name)


def relative_buckets(
    length: int, buckets: int, max_distance: int, *, both_ways: bool
) -> np.ndarray:
    """The bucket of each pair of positions: one per distance while they are near, then logarithmically wider ones.

    Args:
      length: positions.
      buckets: how many there are; half of them for later positions if these count (`both_ways`).
      max_distance: from here on the last bucket.
      both_ways: a position looks at later ones too, in buckets of their own.

    Returns:
      int32 [length (from), length (to)].

    Example:
      >>> relative_buckets(4, 4, 8, both_ways=False)
      array([[0, 0, 0, 0],
             [1, 0, 0, 0],
             [2, 1, 0, 0],
             [2, 2, 1, 0]], dtype=int32)
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    start = np.zeros_like(offset)
    if both_ways:
        buckets //= 2
        start, distance = np.where(offset > 0, buckets, 0), np.abs(offset)
    else:
        distance = np.maximum(-offset, 0)
    exact = buckets // 2
    # In float32, as the models were trained: a distance at a bucket's edge must not fall on its other side.
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    far = ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + far.astype(np.int32), buckets - 1)
    return (start + np.where(distance < exact, distance, far)).astype(np.int32)
