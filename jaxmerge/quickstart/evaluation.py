"""Scores: accuracy on all digits and on each expert's digits."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.data import Digits, split_digits
from jaxmerge.quickstart import network
from jaxmerge.quickstart.training import GROUPS


class Score(NamedTuple):
    """Shares of images classified rightly, in [0, 1].

    Attributes:
      joint: of all images.
      groups: of the images of each expert's digits, in the order of `GROUPS`.
    """

    joint: float
    groups: tuple[float, ...]


def evaluate(params: Mapping[str, Any]) -> jax.Array:
    """Accuracy of the quickstart's network on its validation digits.

    Pure, and may be traced: `jaxmerge sweep recipes/ties.yaml --grid density=0.1:1:8 --evaluate
    jaxmerge.quickstart:evaluate` scores a whole grid in one compiled program.

    Args:
      params: the network's tensors by checkpoint name, "fc1.weight" [128, 64] and so on.

    Returns:
      float32 [], in [0, 1].

    Raises:
      ValueError: a tensor is missing or has another shape.

    Example:
      >>> from jaxmerge.quickstart.network import NETWORK, PIXELS, to_checkpoint
      >>> untrained = NETWORK.init(jax.random.key(0), jnp.zeros((1, PIXELS)))
      >>> 0 <= evaluate(to_checkpoint(untrained)) < 0.3
      Array(True, dtype=bool)
    """
    return fit(network.from_checkpoint(params), _validation())[0]


def fit(variables: Any, digits: Digits) -> tuple[jax.Array, jax.Array]:
    """Accuracy and mean negative log-likelihood of Flax variables; may be traced."""
    logits = network.logits(variables, digits.images)
    right = jnp.argmax(logits, axis=-1) == digits.labels
    rows = jnp.arange(len(digits.labels))
    return jnp.mean(right), -jnp.mean(jax.nn.log_softmax(logits)[rows, digits.labels])


def score_all(models: Sequence[Any], digits: Digits) -> list[Score]:
    """Scores each of the models, given as Flax variables."""
    return [_score(logits, digits) for logits in _all_logits(models, digits)]


def score_ensemble(models: Sequence[Any], digits: Digits) -> Score:
    """Scores the mean of the models' probabilities."""
    logits = _all_logits(models, digits)
    return _score(np.mean(np.asarray(jax.nn.softmax(logits)), axis=0), digits)


def _all_logits(models: Sequence[Any], digits: Digits) -> np.ndarray:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    return np.asarray(_stacked_logits(stacked, digits.images))


_stacked_logits = jax.jit(jax.vmap(network.logits, in_axes=(0, None)))


def _score(logits: np.ndarray, digits: Digits) -> Score:
    right = np.argmax(logits, axis=-1) == digits.labels
    groups = [right[np.isin(digits.labels, group)] for group in GROUPS]
    return Score(float(np.mean(right)), tuple(float(np.mean(group)) for group in groups))


@cache
def _validation() -> Digits:
    return split_digits().validation
