"""One vector per sentence from an encoder's hidden states."""

from typing import Literal

import jax
import jax.numpy as jnp


def pool(
    hidden: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    mode: Literal["mean", "cls", "max"] = "mean",
    normalize: bool = True,
) -> jax.Array:
    """Pools hidden states over the positions that are no padding, in float32.

    mean: sum_l m_l h_l / max(sum_l m_l, 1e-9); max: the largest value of each feature; cls: the first position.
    A sentence that is all padding gives zeros by mean and max.

    Args:
      hidden: [batch, length, features].
      attention_mask: [batch, length], 0 at padding; None for no padding.
      mode: "mean", "cls" or "max".
      normalize: divide each vector by its L2 norm, or by 1e-12 where that is smaller.

    Returns:
      [batch, features], of the dtype of `hidden`.

    Raises:
      ValueError: another mode, or a mask of another shape.

    Reference: Reimers and Gurevych, Sentence-BERT, EMNLP 2019.

    Example:
      >>> hidden = jnp.array([[[3.0, 0.0], [0.0, 8.0], [9.0, 9.0]]])
      >>> pool(hidden, jnp.array([[1, 1, 0]]), normalize=False).tolist()
      [[1.5, 4.0]]
      >>> [[round(x, 3) for x in row] for row in pool(hidden, jnp.array([[1, 1, 0]]), mode="max").tolist()]
      [[0.351, 0.936]]
    """
    if attention_mask is not None and attention_mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"attention_mask: expected shape {hidden.shape[:2]}, found {attention_mask.shape}"
        )
    states = hidden.astype(jnp.float32)
    shape = (*hidden.shape[:2], 1)
    mask = jnp.ones(shape, bool) if attention_mask is None else (attention_mask != 0).reshape(shape)
    if mode == "cls":
        vectors = states[:, 0]
    elif mode == "mean":
        total = jnp.sum(jnp.where(mask, states, 0.0), axis=1)
        vectors = total / jnp.maximum(jnp.sum(mask, axis=1), 1e-9)
    elif mode == "max":
        largest = jnp.max(jnp.where(mask, states, -jnp.inf), axis=1)
        vectors = jnp.where(jnp.any(mask, axis=1), largest, 0.0)
    else:
        raise ValueError(f"mode: expected 'mean', 'cls' or 'max', found {mode!r}")
    if normalize:
        norm = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
        vectors = vectors / jnp.maximum(norm, 1e-12)
    return vectors.astype(hidden.dtype)
