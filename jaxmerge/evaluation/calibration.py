"""Whether a model is as often right as it says."""

import functools

import jax
import jax.numpy as jnp

from jaxmerge.evaluation.scores import Scores, mean


@functools.partial(jax.jit, static_argnames="bins")
def calibration_error(scores: Scores, *, bins: int = 15) -> jax.Array:
    r"""The expected calibration error (ECE): confidence against accuracy in bins of equal width.

    .. math:: \sum_b \frac{n_b}{N} \, |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    Bin b holds the confidences in (b / bins, (b + 1) / bins].

    Args:
      scores: of `score`, fields of any shape.
      bins: how many; static.

    Returns:
      float32 [], between 0 and 1; 0 where nothing counts.

    Raises:
      ValueError: bins is below 1.

    Example:
      >>> from jaxmerge.evaluation import score
      >>> sure_and_wrong = score(jnp.array([[20.0, 0.0]]), jnp.array([1]))
      >>> calibration_error(sure_and_wrong).round(3)
      Array(1., dtype=float32)

    Reference:
      Guo et al., On calibration of modern neural networks, ICML 2017.
    """
    if bins < 1:
        raise ValueError(f"expected at least 1 bin, found {bins}")
    confidence, correct = scores.confidence.reshape(-1), scores.correct.reshape(-1)
    bin_of = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    # What does not count is 0 in both.
    gaps = jax.ops.segment_sum(correct - confidence, bin_of, bins)
    return jnp.sum(jnp.abs(gaps)) / jnp.maximum(jnp.sum(scores.counted), 1)


@jax.jit
def brier_score(scores: Scores) -> jax.Array:
    r"""The mean squared error of the probabilities, summed over classes: 0 at best, 2 at worst.

    .. math:: \frac{1}{N} \sum_i \sum_k (p_{ik} - 1[y_i = k])^2

    Args:
      scores: of `score`, fields of any shape.

    Returns:
      float32 []; 0 where nothing counts.

    Example:
      >>> from jaxmerge.evaluation import score
      >>> brier_score(score(jnp.zeros((1, 2)), jnp.array([1]))).round(3)
      Array(0.5, dtype=float32)

    Reference:
      Brier, Verification of forecasts expressed in terms of probability, Monthly Weather Review 78, 1950.
    """
    return mean(scores.squared_error, scores.counted)
