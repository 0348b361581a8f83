"""Learned soup: shares of the models that do best on held-out examples."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmerge.learning.block_labels import block_labels
from jaxmerge.learning.fit import Keep, fit
from jaxmerge.methods import Hyperparameter, MergeMethod, linear
from jaxmerge.tree import Layout, PerBlock, flatten, per_block
from jaxmerge.tree.blocks import block_names, label_rules

ADAMW = optax.adamw(0.1)


class SoupResult(NamedTuple):
    """What `learned_soup` found.

    Attributes:
      hyperparams: {"weight": float32 [models], or a `PerBlock` with values [blocks, models]}, positive, summing to 1;
        for `jaxmerge.merge("linear", models, **hyperparams)`.
      params: the soup, in the storage dtypes.
      losses: float32 [steps], the cross-entropy in nats before each update.
      skipped: int32 [], see `FitResult`.
      temperature: float32 [], what the logits are divided by.
    """

    hyperparams: dict[str, Any]
    params: Any
    losses: jax.Array
    skipped: jax.Array
    temperature: jax.Array


def learned_soup(
    apply_fn: Callable[[Any, Any], jax.Array],
    models: Sequence[Any],
    inputs: Any,
    labels: Any,
    *,
    level: Literal["model", "layer", "tensor"] = "model",
    steps: int = 200,
    optimizer: optax.GradientTransformation | None = None,
    keep: Keep = "last",
    layout: Layout | None = None,
    dtype: Any = None,
) -> SoupResult:
    r"""Learned soup: learns how much of each model to mix, and a temperature, on held-out labelled data.

    .. math:: \min_{\alpha, T} \frac{1}{|B|} \sum_{(x, y) \in B}
       \mathrm{CE}\!\left(f\big(x; \textstyle\sum_i \alpha_i \theta_i\big) / T,\, y\right), \quad
       \alpha = \mathrm{softmax}(a), \ T > 0

    starting from the uniform soup at T = 1. By layer or tensor, each has shares of its own.

    Args:
      apply_fn: (params, inputs) -> logits [examples, ..., classes].
      models: pytrees of equal structure, fine-tuned from one model.
      inputs: an array, or a pytree of arrays, [batches, examples, ...]; step i sees batch i modulo their number.
      labels: int [batches, examples, ...], classes.
      level: what has shares of its own: the whole "model", each "layer" (see `block_labels`) or "tensor".
      steps: how many updates.
      optimizer: an optax transformation, applied to a and log T; default: AdamW with step size 0.1.
      keep, layout, dtype: as for `fit`.

    Returns:
      A `SoupResult`.

    Raises:
      ValueError: labels that are no integers, or not one for each example.

    Example:
      >>> import jax.numpy as jnp
      >>> good, bad = {"w": jnp.eye(2)}, {"w": -jnp.eye(2)}
      >>> inputs, labels = jnp.eye(2)[None], jnp.array([[0, 1]])
      >>> found = learned_soup(lambda params, x: x @ params["w"], [good, bad], inputs, labels, steps=10)
      >>> bool(found.hyperparams["weight"][0] > 0.6), bool(found.losses[9] < found.losses[0])
      (True, True)

    Reference:
      Wortsman et al., Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
      inference time, ICML 2022.
    """
    if level not in ("model", "layer", "tensor"):
        raise ValueError(f'level is "model", "layer" or "tensor", found {level!r}')
    if not models:
        raise ValueError("learned_soup needs at least one model, found an empty list")
    labels = jnp.asarray(labels)
    _check_labels(inputs, labels)
    start: dict[str, Any] = {}
    if level != "model":
        blocks = block_labels(models[0], level, layout=layout)
        rows = len(block_names(label_rules(blocks)))
        start["logits"] = per_block(np.zeros((rows, len(models))), blocks)
    found = fit(
        _soup(),
        models,
        CrossEntropy(apply_fn),
        hyperparams=start,
        optimizer=ADAMW if optimizer is None else optimizer,
        steps=steps,
        batches=(inputs, labels),
        keep=keep,
        layout=layout,
        dtype=dtype,
    )
    params, temperature = found.params
    weight = _shares(found.hyperparams["logits"])
    return SoupResult({"weight": weight}, params, found.losses, found.skipped, temperature)


@dataclass(frozen=True)
class CrossEntropy:
    """The objective: the mean cross-entropy of the logits over the temperature.

    Attributes:
      apply_fn: (params, inputs) -> logits [..., classes].
    """

    apply_fn: Callable[[Any, Any], jax.Array]

    def __call__(self, soup: tuple[Any, jax.Array], batch: Any, key: jax.Array | None) -> jax.Array:
        params, temperature = soup
        inputs, labels = batch
        logits = self.apply_fn(params, inputs).astype(jnp.float32) / temperature
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@functools.cache
def _soup() -> MergeMethod:
    """The linear method in the coordinates of a soup; it gives the merged model and the temperature."""
    average, infinity = linear(), float("inf")

    def apply(state: Any, hyperparams: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        weight = _shares(hyperparams["logits"])
        return average.apply(state, {"weight": weight}), jnp.exp(hyperparams["log_temperature"])

    hyperparams = {
        "logits": Hyperparameter(0.0, -infinity, infinity, "share of each model", "model"),
        "log_temperature": Hyperparameter(0.0, -infinity, infinity, "sharpness of predictions"),
    }
    return MergeMethod(
        average.init, apply, MappingProxyType(hyperparams), "learned_soup", base="unused"
    )


def _shares(logits: Any) -> Any:
    if isinstance(logits, PerBlock):
        return PerBlock(jax.nn.softmax(logits.values), logits.rules, logits.blocks)
    return jax.nn.softmax(logits)


def _check_labels(inputs: Any, labels: jax.Array) -> None:
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels are integers, one class per example, found {labels.dtype}")
    for path, leaf in flatten(inputs)[0].items():
        if np.ndim(leaf) < 2 or np.shape(leaf)[:2] != labels.shape[:2]:
            raise ValueError(
                f"inputs {path!r} of shape {list(np.shape(leaf))} and labels of shape {list(labels.shape)} "
                "need the same first axes [batches, examples]"
            )
