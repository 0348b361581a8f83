"""What one prediction says of itself, and the means over many: accuracy, cross-entropy, perplexity."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scores(NamedTuple):
    """A few numbers per prediction: all that the metrics need, and thousands of times smaller than the logits.

    Attributes:
      loss: float32 [...], -log p(label) in nats.
      correct: float32 [...], 1 where the label has the largest logit (the first of equal ones), else 0.
      confidence: float32 [...], the largest probability.
      squared_error: float32 [...], sum over classes of (p - 1[class is the label])^2.
      counted: bool [...], False for padding; everything else is then 0.
    """

    loss: jax.Array
    correct: jax.Array
    confidence: jax.Array
    squared_error: jax.Array
    counted: jax.Array


@jax.jit
def score(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> Scores:
    r"""Scores predictions.

    .. math:: p = \mathrm{softmax}(z), \quad \text{loss} = -\log p_y

    Args:
      logits: z, [..., classes], any floating dtype; computed in float32.
      labels: y, int [...]; negative labels count as padding.
      mask: bool [...], False for padding; None: everything counts.

    Returns:
      `Scores` with fields of shape [...].

    Example:
      >>> found = score(jnp.array([[2.0, 0.0], [1.0, 3.0]]), jnp.array([0, 0]))
      >>> accuracy(found), cross_entropy(found)
      (Array(0.5, dtype=float32), Array(1.1269..., dtype=float32))
    """
    logits = logits.astype(jnp.float32)
    counted = labels >= 0 if mask is None else mask & (labels >= 0)
    label = jnp.maximum(labels, 0)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    of_label = jnp.take_along_axis(log_p, label[..., None], axis=-1)[..., 0]
    p = jnp.exp(log_p)

    def kept(values: jax.Array) -> jax.Array:
        # Not a product: padding may have scores that are not finite.
        return jnp.where(counted, values, 0.0)

    return Scores(
        loss=kept(-of_label),
        correct=kept((jnp.argmax(logits, axis=-1) == label).astype(jnp.float32)),
        confidence=kept(jnp.max(p, axis=-1)),
        squared_error=kept(jnp.sum(p * p, axis=-1) - 2 * jnp.exp(of_label) + 1),
        counted=counted,
    )


@jax.jit
def score_next_tokens(
    logits: jax.Array, tokens: jax.Array, mask: jax.Array | None = None
) -> Scores:
    """Scores what a decoder predicts after each token but the last.

    Args:
      logits: [..., length, vocabulary]; those at a position predict the token after it.
      tokens: int [..., length].
      mask: bool [..., length], False for padding; None: everything counts. A prediction counts where both its token and
        the next one do.

    Returns:
      `Scores` with fields of shape [..., length - 1].

    Example:
      >>> logits = jnp.zeros((1, 3, 7))
      >>> round(float(perplexity(score_next_tokens(logits, jnp.array([[1, 2, 3]])))), 3)
      7.0
    """
    pairs = None if mask is None else mask[..., 1:] & mask[..., :-1]
    return score(logits[..., :-1, :], tokens[..., 1:], pairs)


@jax.jit
def accuracy(scores: Scores) -> jax.Array:
    """The share of predictions that are right; 0 where nothing counts.

    Args:
      scores: of `score`, fields of any shape.

    Returns:
      float32 [].

    Example:
      >>> float(accuracy(score(jnp.eye(4), jnp.array([0, 1, 0, 3]))))
      0.75
    """
    return mean(scores.correct, scores.counted)


@jax.jit
def cross_entropy(scores: Scores) -> jax.Array:
    """The mean loss in nats; 0 where nothing counts.

    Args:
      scores: of `score` or `score_next_tokens`, fields of any shape.

    Returns:
      float32 [].

    Example:
      >>> round(float(cross_entropy(score(jnp.zeros((1, 4)), jnp.array([2])))), 4)
      1.3863
    """
    return mean(scores.loss, scores.counted)


@jax.jit
def perplexity(scores: Scores) -> jax.Array:
    r"""The exponential of the mean loss over all tokens that count; 1 where nothing does.

    .. math:: \exp\Big(-\frac{1}{N} \sum_i \log p(x_{i+1} \mid x_{\le i})\Big)

    Args:
      scores: of `score_next_tokens`, fields of any shape.

    Returns:
      float32 [].

    Example:
      >>> round(float(perplexity(score(jnp.zeros((5, 4)), jnp.arange(5) % 4))), 3)
      4.0
    """
    return jnp.exp(cross_entropy(scores))


def mean(values: jax.Array, counted: jax.Array) -> jax.Array:
    """The mean of the values that count; those that do not are 0 already."""
    return jnp.sum(values) / jnp.maximum(jnp.sum(counted), 1)
