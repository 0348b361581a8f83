"""AdaMerging: coefficients that make the merged model sure of its predictions on unlabelled data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmerge.learning.block_labels import block_labels
from jaxmerge.learning.fit import FitResult, Keep, fit
from jaxmerge.methods import MergeMethod, task_arithmetic
from jaxmerge.tree import Layout, per_block
from jaxmerge.tree.blocks import block_names, label_rules

ApplyFn = Callable[[Any, Any], jax.Array]
ADAM = optax.adam(1e-3)


def adamerging(
    apply_fns: ApplyFn | Sequence[ApplyFn],
    models: Sequence[Any],
    inputs: Sequence[Any],
    *,
    base: Any,
    level: Literal["task", "layer", "tensor"] = "task",
    labels: Any = None,
    method: MergeMethod | None = None,
    hyperparams: Mapping[str, Any] | None = None,
    start: Any = 0.3,
    steps: int = 500,
    optimizer: optax.GradientTransformation | None = None,
    keep: Keep = "last",
    key: jax.Array | None = None,
    layout: Layout | None = None,
    dtype: Any = None,
) -> FitResult:
    r"""AdaMerging: learns merging coefficients without labels, by minimising the entropy of the predictions.

    .. math:: \min_\lambda \sum_t \frac{1}{|B_t|} \sum_{x \in B_t} H\big(\mathrm{softmax} f_t(x; \theta(\lambda))\big),
       \quad \theta_l(\lambda) = \theta_{0,l} + \textstyle\sum_k \lambda_{k,l} (\theta_{k,l} - \theta_{0,l})

    with one coefficient per model (task-wise), or per model and layer l (layer-wise) or tensor. Under
    `jaxmerge.methods.ties` the task vectors are trimmed and elected before they are added (AdaMerging++; here the
    coefficients take part in the election). `scale` stays 1, and a method's `normalize` is 0.

    Args:
      apply_fns: (params, inputs) -> logits [..., classes]; one function, or one per task where heads differ.
      models: one fine-tuned model per task.
      inputs: per task an array, or a pytree of arrays, [batches, examples, ...]; step i sees batch i modulo their
        number.
      base: the model that they were fine-tuned from.
      level: "task"; "layer", as tensors' names give it, see `block_labels`; "tensor", each layer of a stacked leaf on
        its own.
      labels: in place of `level`, which tensors share coefficients; as for `jaxmerge.tree.per_block`.
      method: a method with a weight per model; default `jaxmerge.methods.task_arithmetic()`.
      hyperparams: the method's other hyperparameters, held fixed.
      start: where the coefficients start, a number or one per model.
      steps: how many updates.
      optimizer: an optax transformation; default: Adam with step size 0.001.
      keep, key, layout, dtype: as for `fit`.

    Returns:
      A `FitResult`; ``hyperparams["weight"]`` is float32 [models], or a `PerBlock` with values [blocks, models].

    Raises:
      ValueError: not one array of inputs and one function per model, a method without a weight per model.

    Example:
      >>> import jax.numpy as jnp
      >>> base, model = {"w": jnp.zeros((2, 2))}, {"w": jnp.eye(2)}
      >>> inputs = [jnp.eye(2)[None]]
      >>> found = adamerging(lambda params, x: x @ params["w"], [model], inputs, base=base, steps=5)
      >>> bool(found.hyperparams["weight"][0] > 0.3), bool(found.losses[4] < found.losses[0])
      (True, True)

    Reference:
      Yang et al., AdaMerging: Adaptive Model Merging for Multi-Task Learning, ICLR 2024.
    """
    method = task_arithmetic() if method is None else method
    functions = (apply_fns,) * len(models) if callable(apply_fns) else tuple(apply_fns)
    for found, what in ((len(inputs), "arrays of inputs"), (len(functions), "functions")):
        if found != len(models):
            raise ValueError(
                f"adamerging needs one task per model, {len(models)}, found {found} {what}"
            )
    weight = method.hyperparams.get("weight")
    if getattr(weight, "scope", None) != "model":
        raise ValueError(
            f"adamerging needs a method with a weight per model; {method.name} has none"
        )
    if level not in ("task", "layer", "tensor"):
        raise ValueError(f'level is "task", "layer" or "tensor", found {level!r}')
    if labels is None and level != "task":
        labels = block_labels(base, level, layout=layout)
    coefficients = np.asarray(start, np.float64)
    if coefficients.shape not in ((), (len(models),)):
        raise ValueError(
            f"start is a number or {len(models)} numbers (one per model), found shape {list(coefficients.shape)}"
        )
    coefficients = np.broadcast_to(coefficients, len(models))
    given: dict[str, Any] = {"weight": coefficients}
    if labels is not None:
        blocks = len(block_names(label_rules(labels)))
        given["weight"] = per_block(np.tile(coefficients, (blocks, 1)), labels)
    if "normalize" in method.hyperparams:
        given["normalize"] = 0.0
    return fit(
        method,
        models,
        Entropy(functions),
        base=base,
        hyperparams={**given, **(hyperparams or {})},
        learn="weight",
        optimizer=ADAM if optimizer is None else optimizer,
        steps=steps,
        batches=tuple(inputs),
        keep=keep,
        key=key,
        layout=layout,
        dtype=dtype,
    )


@dataclass(frozen=True)
class Entropy:
    """The objective: the tasks' mean entropies, added up.

    Attributes:
      apply_fns: one function per task.
    """

    apply_fns: tuple[ApplyFn, ...]

    def __call__(self, params: Any, batch: tuple[Any, ...], key: jax.Array | None) -> jax.Array:
        return jnp.sum(
            jnp.stack(
                [
                    jnp.mean(_entropy(apply_fn(params, x)))
                    for apply_fn, x in zip(self.apply_fns, batch, strict=True)
                ]
            )
        )


def _entropy(logits: jax.Array) -> jax.Array:
    """Entropy over the last axis, in nats; a class with the logit -inf adds nothing."""
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    shares = jnp.exp(logs)
    return -jnp.sum(shares * jnp.where(shares > 0, logs, 0.0), axis=-1)
