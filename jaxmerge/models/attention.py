"""Attention of queries to keys, with fewer key heads than query heads where the model has them."""

import jax
import jax.numpy as jnp


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | jax.Array,
    softcap: float | None = None,
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    r"""Softmax attention, computed in float32: softmax(scale q k^T) v.

    Query head h reads key head h // (heads / key_heads). A query that may read nothing gets the mean of all values.

    Args:
      query: [batch, queries, heads, width].
      key: [batch, slots, key_heads, width]; `key_heads` divides `heads`.
      value: likewise.
      mask: bool [batch or 1, queries, slots], true where a query may read a slot.
      scale: of the scores.
      softcap: c, bounds the scores as c tanh(score / c).
      precision: of the products.

    Returns:
      [batch, queries, heads * width] in the dtype of `value`.

    Example:
      >>> one = jnp.ones((1, 2, 1, 4))
      >>> attend(one, one, one, jnp.ones((1, 2, 2), bool), scale=0.5).shape
      (1, 2, 4)
    """
    batch, queries, heads, width = query.shape
    key_heads = key.shape[2]
    # The heads of one group share a product, so keys and values are never repeated.
    grouped = query.reshape(batch, queries, key_heads, heads // key_heads, width)
    scores = scale * jnp.einsum(
        "bqkgd,bskd->bkqgs", grouped, key, precision=precision, preferred_element_type=jnp.float32
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    # Not -inf: a row of a padding token, all of it masked, would be NaN.
    lowest = jnp.finfo(jnp.float32).min
    weights = jax.nn.softmax(jnp.where(mask[:, None, :, None, :], scores, lowest), axis=-1)
    read = jnp.einsum("bkqgs,bskd->bqkgd", weights.astype(value.dtype), value, precision=precision)
    return read.reshape(batch, queries, heads * width)
