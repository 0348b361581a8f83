"""`jm.merge`: one merge, from models to a merged model."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxmerge.methods import engine
from jaxmerge.methods.method import MergeMethod
from jaxmerge.methods.registry import get
from jaxmerge.tree import Layout


def merge(
    method: str | MergeMethod,
    models: Sequence[Any],
    /,
    *,
    base: Any = None,
    key: jax.Array | None = None,
    layout: Layout | None = None,
    dtype: Any = None,
    extras: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **hyperparams: Any,
) -> Any:
    """Merges models into one.

    Args:
      method: a registered name (`jaxmerge.methods.names()`), or what a constructor returns.
      models: pytrees of equal structure and shapes: linen variables, pure dicts of nnx, flat dicts of checkpoint names.
        Floating-point leaves are merged; integers, booleans and empty arrays are taken from the base, or from the
        first model.
      base: the model that task vectors are measured from; required by the methods that work on task vectors.
      key: a JAX key; required by random methods.
      layout: how leaves relate to a checkpoint's tensors; see `jaxmerge.tree.Layout`.
      dtype: dtype of the merged leaves; default: that of the base, or of the first model. Arithmetic is in float32.
      extras: what else the method declares in `MergeMethod.extras` (Fisher information, Gram matrices), by name.
      options: the method's static options, where `method` is a name.
      **hyperparams: numbers, sequences or 1-D arrays (one number per model), or `jaxmerge.tree.per_block` values.

    Returns:
      A pytree like the base (or the first model). A method with per-task results (`MergeMethod.per_task`) returns the
      pytree and a `PerTask`.

    Raises:
      ValueError: unknown method, hyperparameter or tensor, wrong lengths or shapes, a value out of bounds, a missing
        base or key; raised before any work.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, b = {"w": jnp.array([0.0, 2.0])}, {"w": jnp.array([4.0, 2.0])}
      >>> jm.merge("linear", [a, b], weight=[0.75, 0.25])["w"]
      Array([1., 2.], dtype=float32)
    """
    if isinstance(method, str):
        method = get(method)(**(options or {}))
    elif options:
        raise ValueError("options go with a method's name; this is a constructed method")
    if method.leaf is not None:
        return engine.merge_once(
            method.leaf, models, base, hyperparams, key, layout=layout, extras=extras, dtype=dtype
        )
    state = method.init(models, base, layout=layout, extras=extras, dtype=dtype)
    return method.apply(state, hyperparams, key)
