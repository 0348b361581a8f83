"""BatchNorm's running statistics, computed anew for a model whose weights have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.align.spec import STATISTICS
from jaxmerge.tree import flatten, matches, unflatten


def reset_batch_norm(
    apply_train: Callable[..., tuple[Any, Any]],
    variables: Any,
    batches: Iterable[Any],
    *,
    statistics: Sequence[str] = STATISTICS,
) -> Any:
    r"""Computes the running statistics anew: the mean over batches of each batch's statistics.

    .. math:: \mu = \frac{1}{K} \sum_{k=1}^K \mu_k, \qquad \sigma^2 = \frac{1}{K} \sum_{k=1}^K \sigma_k^2

    One pass in training mode, in which every layer normalises by the batch. A step that moves a statistic by a share,
    :math:`m s + (1 - m) s_k`, gives away the batch's own :math:`s_k`; the share m is found by running the first batch
    with all statistics 0 and with all 1.

    Args:
      apply_train: a traceable function (variables, *inputs) -> (outputs, updated), as
        ``lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"])`` for Flax linen. `updated` holds the
        moved statistics under the paths that `variables` has them under; whatever else it holds is not used.
      variables: the model: parameters and statistics. Arrays may be traced.
      batches: inputs, one after the other, each an array or other pytree, or a tuple of what `apply_train` takes after
        the variables.
      statistics: patterns of the paths of running statistics.

    Returns:
      A tree like `variables`, with new statistics.

    Raises:
      ValueError: there is no batch; no running statistic; one that `apply_train` does not return or does not move.

    Example:
      >>> def apply_train(v, x):
      ...     moved = {k: 0.9 * v["batch_stats"][k] + 0.1 * f(x, 0) for k, f in (("mean", jnp.mean), ("var", jnp.var))}
      ...     return x, {"batch_stats": moved}
      >>> old = {"batch_stats": {"mean": jnp.full(1, 7.0), "var": jnp.ones(1)}}
      >>> new = reset_batch_norm(apply_train, old, [jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [8.0]])])
      >>> new["batch_stats"]["mean"].round(4).tolist(), new["batch_stats"]["var"].round(4).tolist()
      ([3.5], [2.5])

    Reference:
      Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018.
    """
    leaves, definition = flatten(variables)
    names = [path for path in leaves if any(matches(path, pattern) for pattern in statistics)]
    if not names:
        raise ValueError(f"no path is a running statistic: none matches {list(statistics)}")

    @jax.jit
    def moved(leaves: dict[str, Any], value: Any, inputs: tuple[Any, ...]) -> dict[str, jax.Array]:
        filled = {name: jnp.full_like(leaves[name], value) for name in names}
        given = unflatten(definition, {**leaves, **filled}.values())
        found = flatten(apply_train(given, *inputs)[1])[0]
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"apply_train returns no new {missing[0]!r} beside its outputs")
        return {name: found[name] for name in names}

    total: dict[str, jax.Array] = {}
    share: dict[str, jax.Array] = {}
    count = 0
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        zero = moved(leaves, 0.0, inputs)
        if not count:
            one = moved(leaves, 1.0, inputs)
            share = {name: 1 - (one[name] - zero[name]) for name in names}
            for name, part in share.items():
                if not isinstance(part, jax.core.Tracer) and bool(jnp.any(part <= 0)):
                    raise ValueError(f"apply_train does not move the statistic {name!r}")
        total = {name: zero[name] + total[name] if count else zero[name] for name in names}
        count += 1
    if not count:
        raise ValueError("running statistics need at least one batch of inputs, found none")
    new = {name: (total[name] / share[name] / count).astype(leaves[name].dtype) for name in names}
    return unflatten(definition, {**leaves, **new}.values())
