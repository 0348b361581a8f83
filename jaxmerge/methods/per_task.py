"""Per-task results: masks and factors that turn one merged model into a version for each task."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.methods.inputs import is_mergeable
from jaxmerge.methods.leaf import widen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerTask:
    """What each task takes of the merged task vector.

    Attributes:
      masks: a tree like the model; each leaf bool [tasks, ...].
      factors: float32 [tasks].
    """

    masks: Any
    factors: jax.Array


def for_task(params: Any, base: Any, per_task: PerTask, task: int | jax.Array) -> Any:
    r"""The merged model's version for one task.

    .. math:: \theta_t = \theta_0 + f_t\, m_t \odot (\theta - \theta_0)

    Args:
      params: the merged model, as `emr` or `tall_masks` return it.
      base: the base that it was merged with.
      per_task: the masks and factors that were returned beside it.
      task: index of the model whose task it is; may be traced, or vmapped over.

    Returns:
      A tree like `params`. Leaves that are not floating point come from `params`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([2.0, 1.0])}, {"w": jnp.array([1.0, -3.0])}
      >>> merged, per_task = jm.merge("emr", [a, b], base=base)
      >>> merged["w"], jm.methods.for_task(merged, base, per_task, 0)["w"]
      (Array([ 2., -3.], dtype=float32), Array([3., 0.], dtype=float32))
    """

    def one(merged: Any, origin: Any, masks: jax.Array) -> Any:
        if not is_mergeable(merged):
            return merged
        start = widen(jnp.asarray(origin))
        delta = widen(jnp.asarray(merged)) - start
        taken = jnp.where(masks[task], delta, 0.0)
        return (start + per_task.factors[task] * taken).astype(merged.dtype)

    return jax.tree.map(one, params, base, per_task.masks)
