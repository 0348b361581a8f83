"""BERT and what has its blocks: RoBERTa, MiniLM and other sentence encoders, with the heads that checkpoints carry."""

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models.activations import ACTIVATIONS
from jaxmerge.models.attention import padding_mask
from jaxmerge.models.inputs import named_inputs
from jaxmerge.models.linear import dense, layer_norm, precision_of
from jaxmerge.models.multi_head import Attention
from jaxmerge.models.transformer import FeedForward


@dataclass(frozen=True)
class BertConfig:
    """The structure of a BERT.

    Attributes:
      vocab_size: token ids.
      hidden_size: features of a position.
      num_layers: blocks.
      num_heads: attention heads; they share the features evenly.
      intermediate_size: features inside the feed-forward part.
      max_positions: rows of the table of positions.
      type_vocab_size: segment ids.
      activation: a key of `ACTIVATIONS`, inside the feed-forward part.
      norm_eps: epsilon of the layer norms.
      padding_id: None where positions count 0, 1, 2, ... (BERT). RoBERTa's padding token: positions count the other
        tokens from `padding_id` + 1 on, and padding stands at `padding_id`.
      pooler: tanh of a linear map of the first position.
      masked_lm: a head that gives logits over the vocabulary at each position.
      tied: its last map is the table of token embeddings.
      next_sentence: a head on the pooler that only pre-training uses; its parameters are kept.
      classifier: a linear map to labels: of the "pooled" first position, of tanh of another linear map of the first
        position ("hidden", RoBERTa's), or of each position ("token"); None for no such head.
      num_labels: how many labels.
      dtype: of the computation.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    padding_id: int | None = None
    pooler: bool = False
    masked_lm: bool = False
    tied: bool = True
    next_sentence: bool = False
    classifier: Literal["pooled", "hidden", "token"] | None = None
    num_labels: int = 0
    dtype: str = "float32"


class Bert(nn.Module):
    """A BERT: logits where it has a classifier or a masked-LM head, else the last hidden state.

    Reference: Devlin et al., BERT, NAACL 2019; Liu et al., RoBERTa, 2019.

    Example:
      >>> config = BertConfig(
      ...     vocab_size=30, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16, max_positions=12
      ... )
      >>> ids = jnp.array([[2, 7, 3, 0]])
      >>> params = Bert(config).init(jax.random.key(0), ids)
      >>> Bert(config).apply(params, {"input_ids": ids, "attention_mask": ids != 0}).shape
      (1, 4, 8)
    """

    config: BertConfig

    def setup(self) -> None:
        config = self.config
        self.token_embedding = self._table(config.vocab_size)
        self.position_embedding = self._table(config.max_positions)
        self.type_embedding = self._table(config.type_vocab_size)
        self.embedding_norm = layer_norm(config.norm_eps, jnp.dtype(config.dtype))
        self.layers = [BertBlock(config) for _ in range(config.num_layers)]
        if config.pooler:
            self.pooler = self._linear(config.hidden_size)
        if config.next_sentence:
            self.next_sentence = self._linear(2)
        if config.masked_lm:
            self.masked_lm = MaskedLanguageModel(config)
        if config.classifier == "hidden":
            self.classifier_hidden = self._linear(config.hidden_size)
        if config.classifier is not None:
            self.classifier = self._linear(config.num_labels)

    def __call__(self, inputs: Any) -> jax.Array:
        """Runs the encoder and its head.

        Args:
          inputs: token ids [batch, length], or a dict with "input_ids" and, each [batch, length] too,
            "attention_mask" (0 at padding) and "token_type_ids".

        Returns:
          A classifier's logits [batch, labels], or [batch, length, labels] where it labels tokens; else a masked-LM
          head's [batch, length, vocabulary]; else the last hidden state [batch, length, features].
        """
        config = self.config
        hidden = self.encode(inputs)
        first = hidden[:, 0]
        # Also computed where nothing needs it, so that `init` makes its parameters; compiled, it is left out.
        pooled = jnp.tanh(self.pooler(first)) if config.pooler else first
        if config.next_sentence:
            self.next_sentence(pooled)
        outputs = hidden
        if config.masked_lm:
            table = self.token_embedding.embedding if config.tied else None
            outputs = self.masked_lm(hidden, table)
        if config.classifier == "pooled":
            outputs = self.classifier(pooled)
        elif config.classifier == "hidden":
            outputs = self.classifier(jnp.tanh(self.classifier_hidden(first)))
        elif config.classifier == "token":
            outputs = self.classifier(hidden)
        return outputs

    def encode(self, inputs: Any) -> jax.Array:
        """The last hidden state [batch, length, features], whatever heads there are; inputs as for `__call__`."""
        given = named_inputs(inputs, ["input_ids"], ["attention_mask", "token_type_ids"])
        ids = given["input_ids"]
        types = given.get("token_type_ids", jnp.zeros_like(ids))
        x = self.token_embedding(ids) + self.type_embedding(types)
        x = self.embedding_norm(x + self.position_embedding(self._positions(ids)))
        mask = padding_mask(given["attention_mask"]) if "attention_mask" in given else None
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def _positions(self, ids: jax.Array) -> jax.Array:
        padding, length = self.config.padding_id, ids.shape[1]
        longest = self.config.max_positions - (0 if padding is None else padding + 1)
        if length > longest:
            raise ValueError(f"{length} tokens, but the model has positions for {longest}")
        if padding is None:
            return jnp.broadcast_to(jnp.arange(length), ids.shape)
        real = (ids != padding).astype(jnp.int32)
        return jnp.cumsum(real, axis=1) * real + padding

    def _table(self, rows: int) -> nn.Embed:
        return nn.Embed(rows, self.config.hidden_size, dtype=jnp.dtype(self.config.dtype))

    def _linear(self, size: int) -> nn.Dense:
        return dense(size, self.config.dtype)


class BertBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + feed_forward(x))."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """[batch, length, features] -> the same; `mask` as for `attend`."""
        config = self.config
        attention = Attention(
            num_heads=config.num_heads,
            head_size=config.hidden_size // config.num_heads,
            dtype=jnp.dtype(config.dtype),
            name="attention",
        )
        feed_forward = FeedForward(
            config.intermediate_size,
            config.activation,
            dtype=jnp.dtype(config.dtype),
            name="feed_forward",
        )
        x = layer_norm(config.norm_eps, jnp.dtype(config.dtype), "attention_norm")(
            x + attention(x, mask=mask)
        )
        return layer_norm(config.norm_eps, jnp.dtype(config.dtype), "feed_forward_norm")(
            x + feed_forward(x)
        )


class MaskedLanguageModel(nn.Module):
    """norm(act(dense(x))) E^T + bias, with E the table of token embeddings or a matrix of its own."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array | None) -> jax.Array:
        """x [batch, length, features], table [vocabulary, features] -> [batch, length, vocabulary]."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        hidden = dense(config.hidden_size, dtype, name="dense")(x)
        # RoBERTa has the exact GELU here whatever its blocks have.
        roberta = config.padding_id is not None
        hidden = ACTIVATIONS["gelu" if roberta else config.activation](hidden)
        hidden = layer_norm(config.norm_eps, dtype, "norm")(hidden)
        if table is None:
            return dense(config.vocab_size, dtype, name="decoder")(hidden)
        bias = self.param("bias", nn.initializers.zeros, (config.vocab_size,))
        scores = jnp.matmul(hidden, table.T.astype(dtype), precision=precision_of(dtype))
        return scores + bias[None, None].astype(dtype)
