"""Softmax attention of queries to keys, and the masks that it takes."""

import jax
import jax.numpy as jnp

from jaxmerge.models.linear import precision_of


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float | jax.Array,
    bias: jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    r"""softmax(scale q k^T + bias) v for each head; the softmax in float32 or wider.

    Query head h reads key head h // (heads / key_heads). A query that may read nothing gets the mean of all values.

    Args:
      query: [batch, queries, heads, width].
      key: [batch, slots, key_heads, width]; `key_heads` divides `heads`.
      value: likewise.
      mask: bool [batch or 1, queries or 1, slots], true where a query may read a slot; None for everywhere.
      scale: of the scores.
      bias: [batch or 1, heads, queries, slots], added to the scaled scores.
      softcap: c, bounds the scores as c tanh(score / c).

    Returns:
      [batch, queries, heads, width] in the dtype of `value`.

    Example:
      >>> one = jnp.ones((1, 2, 1, 4))
      >>> attend(one, one, one, causal_mask(2), scale=0.5).shape
      (1, 2, 1, 4)
    """
    batch, queries, heads, width = query.shape
    slots, key_heads = key.shape[1:3]
    groups = heads // key_heads
    precision = precision_of(value.dtype)
    # The heads of one group share a product, so keys and values are never repeated.
    grouped = query.reshape(batch, queries, key_heads, groups, width)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = scale * jnp.einsum(
        "bqkgd,bskd->bkqgs", grouped, key, precision=precision, preferred_element_type=wide
    )
    if bias is not None:
        by_group = bias.reshape(bias.shape[0], key_heads, groups, queries, slots)
        scores = scores + jnp.swapaxes(by_group, 2, 3)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        # Not -inf: a row of a padding token, all of it masked, would be NaN.
        lowest = jnp.finfo(jnp.float32).min
        scores = jnp.where(mask[:, None, :, None, :], scores, lowest)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    read = jnp.einsum("bkqgs,bskd->bqkgd", weights, value, precision=precision)
    return read.reshape(batch, queries, heads, width)


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
