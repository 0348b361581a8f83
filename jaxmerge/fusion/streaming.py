"""Streaming averages of parameters: the interface, the state, and the one step that all of them take."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.tree import flatten, nearest, unflatten


class StreamingAverage(NamedTuple):
    """An average that takes one model at a time.

    The three functions are pure: they run under `jit`, `vmap` (an average per run) and `lax.scan`. The state keeps its
    structure, shapes and dtypes. Every tensor is treated element by element and stays where it is. Floating-point (and
    complex) tensors are averaged in float32, or in float64 if they are; others (integers, booleans, keys) are those of
    the latest model that was taken.

    Attributes:
      init: ``init(params) -> state``. It fixes the structure, shapes and dtypes; unless the constructor says otherwise,
        these parameters do not count as a model. Nothing is shared with `params`: both may be donated.
      update: ``update(state, params) -> state``. `params` has the tensors of `init`, with the same shapes; a
        ValueError names the tensor that has not.
      average: ``average(state) -> params``, in the dtypes given to `init`; those very parameters before any update.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], Any]
    average: Callable[[Any], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AverageState:
    """What a streaming average remembers.

    Attributes:
      step: int32 []; the updates so far.
      weight: []; how many models the average holds (int32), or the sum of their weights (float).
      values: a tree like the parameters. A tensor that is averaged is in the dtype of the arithmetic; where a window is
        kept, it is in its own dtype with a leading axis [last].
      dtypes: the dtypes that `average` gives back, in the order of the tree; static.
    """

    step: jax.Array
    weight: jax.Array
    values: Any
    dtypes: tuple[Any, ...] = dataclasses.field(metadata={"static": True})


def begin(params: Any) -> tuple[Any, tuple[Any, ...]]:
    """Copies parameters into the dtypes of the arithmetic.

    Returns:
      The values and the parameters' own dtypes, in the order of the tree.
    """
    leaves, definition = flatten(params)
    arrays = [jnp.asarray(leaf) for leaf in leaves.values()]
    # A copy even where the dtype stays: a step that donates its parameters and this state must not meet one buffer
    # twice.
    values = [jnp.array(array, arithmetic(array.dtype)) for array in arrays]
    return unflatten(definition, values), tuple(array.dtype for array in arrays)


def finish(values: Any, dtypes: tuple[Any, ...]) -> Any:
    """Copies values back into the parameters' own dtypes."""
    leaves, definition = jax.tree.flatten(values)
    arrays = [jnp.array(leaf, dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    return jax.tree.unflatten(definition, arrays)


def blend(values: Any, params: Any, share: jax.Array) -> Any:
    """Moves values towards parameters: values + share * (params - values).

    Args:
      values: the average so far, as `begin` gives it.
      params: the next model.
      share: []; at 1 the result is `params` exactly, whatever the values held; at 0 the values stay, whatever `params`
        hold.

    Raises:
      ValueError: the trees hold different tensors.
    """
    leaves, definition = jax.tree.flatten(values)

    def move(old: jax.Array, new: jax.Array) -> jax.Array:
        if not is_averaged(old.dtype):
            return jnp.where(share > 0, new, old)
        moved = old + share.astype(old.dtype) * (new - old)
        return jnp.where(share >= 1, new, jnp.where(share > 0, moved, old))

    news = incoming(values, params)
    return jax.tree.unflatten(definition, list(map(move, leaves, news)))


def incoming(expected: Any, params: Any) -> list[jax.Array]:
    """The leaves of a model in the order and the dtypes of the expected tree.

    Args:
      expected: a tree of arrays or of `jax.ShapeDtypeStruct`.
      params: the next model.

    Raises:
      ValueError: a missing or additional tensor, another shape, or another kind (a float where an integer was).
    """
    known, found = flatten(expected)[0], flatten(params)[0]
    missing = [path for path in known if path not in found]
    extra = [path for path in found if path not in known]
    if missing:
        hint = nearest(missing[0], extra)
        raise ValueError(f"the update lacks tensor {missing[0]!r}, which init was given{hint}")
    if extra:
        raise ValueError(f"the update has tensor {extra[0]!r}, which init was not given")
    return [_fitted(path, one, jnp.asarray(found[path])) for path, one in known.items()]


def is_averaged(dtype: Any) -> bool:
    """Whether tensors of a dtype are averaged; of the others the latest is kept."""
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def arithmetic(dtype: Any) -> Any:
    """The dtype in which tensors of a dtype are averaged: float32 instead of a narrower one."""
    narrow = is_averaged(dtype) and jnp.finfo(dtype).bits < 32
    return jnp.dtype("float32") if narrow else dtype


def real() -> Any:
    """The dtype of weights and scores: float64 where JAX has it enabled, else float32."""
    return jnp.result_type(float)


def _fitted(path: str, expected: Any, array: jax.Array) -> jax.Array:
    if array.shape != expected.shape:
        raise ValueError(
            f"tensor {path!r}: init was given shape {list(expected.shape)}, "
            f"the update has {list(array.shape)}"
        )
    if _kind(array.dtype) != _kind(expected.dtype):
        raise ValueError(
            f"tensor {path!r}: init was given {_kind(expected.dtype)} numbers, "
            f"the update has {array.dtype}"
        )
    return array if array.dtype == expected.dtype else array.astype(expected.dtype)


def _kind(dtype: Any) -> str:
    kinds = {
        "floating-point": jnp.floating,
        "complex": jnp.complexfloating,
        "boolean": jnp.bool_,
        "integer": jnp.integer,
    }
    return next((name for name, kind in kinds.items() if jnp.issubdtype(dtype, kind)), str(dtype))
