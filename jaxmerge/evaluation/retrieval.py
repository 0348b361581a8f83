"""Whether the right documents come first."""

import functools

import jax
import jax.numpy as jnp


@jax.jit
def cosine_similarity(queries: jax.Array, documents: jax.Array) -> jax.Array:
    """Cosines of the angles between embeddings; 0 for an embedding of zeros.

    Args:
      queries: [..., queries, width].
      documents: [..., documents, width], equal leading axes.

    Returns:
      float32 [..., queries, documents].

    Example:
      >>> cosine_similarity(jnp.array([[3.0, 4.0]]), jnp.array([[1.0, 0.0], [6.0, 8.0]])).round(3)
      Array([[0.6, 1. ]], dtype=float32)
    """
    return jnp.matmul(
        _unit(queries),
        jnp.swapaxes(_unit(documents), -1, -2),
        precision=jax.lax.Precision.HIGHEST,
    )


@functools.partial(jax.jit, static_argnames="k")
def recall_at_k(
    similarity: jax.Array,
    relevant: jax.Array,
    *,
    k: int,
    queries: jax.Array | None = None,
    documents: jax.Array | None = None,
) -> jax.Array:
    r"""The share of a query's relevant documents among its k most similar ones, averaged over queries.

    Of equally similar documents the first comes first. Queries without a relevant document do not count.

    Args:
      similarity: [queries, documents], more is closer.
      relevant: int [queries], each query's one document (negative for none); or bool [queries, documents].
      k: how many documents are looked at; static.
      queries: bool [queries], False for padding; None: all count.
      documents: bool [documents], False for padding; None: all count.

    Returns:
      float32 []; 0 where no query counts.

    Raises:
      ValueError: k is below 1.

    Example:
      >>> similarity = jnp.array([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
      >>> recall_at_k(similarity, jnp.array([0, 2]), k=1)
      Array(0.5, dtype=float32)
    """
    if k < 1:
        raise ValueError(f"expected k of at least 1, found {k}")
    hits = _in_order(similarity, relevant, documents)
    total = jnp.sum(hits, axis=-1)
    found = jnp.sum(hits[:, :k], axis=-1) / jnp.maximum(total, 1)
    return _mean_over_queries(found, total, queries)


@jax.jit
def mean_reciprocal_rank(
    similarity: jax.Array,
    relevant: jax.Array,
    *,
    queries: jax.Array | None = None,
    documents: jax.Array | None = None,
) -> jax.Array:
    r"""The mean over queries of 1 / rank of the first relevant document (MRR).

    Args:
      similarity: as for `recall_at_k`.
      relevant: as for `recall_at_k`.
      queries: as for `recall_at_k`.
      documents: as for `recall_at_k`.

    Returns:
      float32 []; 0 where no query counts.

    Example:
      >>> similarity = jnp.array([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
      >>> mean_reciprocal_rank(similarity, jnp.array([0, 2]))
      Array(0.75, dtype=float32)
    """
    hits = _in_order(similarity, relevant, documents)
    total = jnp.sum(hits, axis=-1)
    first = jnp.argmax(hits, axis=-1)
    return _mean_over_queries(1 / (first + 1.0), total, queries)


def _unit(embeddings: jax.Array) -> jax.Array:
    embeddings = embeddings.astype(jnp.float32)
    norm = jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
    return embeddings / jnp.where(norm > 0, norm, 1.0)


def _in_order(similarity: jax.Array, relevant: jax.Array, documents: jax.Array | None) -> jax.Array:
    """Whether each query's documents are relevant, most similar first."""
    count = similarity.shape[-1]
    if relevant.dtype != jnp.bool_:
        relevant = relevant[:, None] == jnp.arange(count)[None, :]
    if documents is not None:
        relevant = relevant & documents[None, :]
        similarity = jnp.where(documents[None, :], similarity, -jnp.inf)
    order = jnp.argsort(-similarity, axis=-1, stable=True)
    return jnp.take_along_axis(relevant, order, axis=-1)


def _mean_over_queries(values: jax.Array, total: jax.Array, queries: jax.Array | None) -> jax.Array:
    counted = total > 0 if queries is None else queries & (total > 0)
    return jnp.sum(jnp.where(counted, values, 0.0)) / jnp.maximum(jnp.sum(counted), 1)
