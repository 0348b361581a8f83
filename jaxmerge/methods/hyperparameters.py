"""Hyperparameters: what a method takes, and how a given value reaches each tensor."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.methods.counting import count
from jaxmerge.tree import PerBlock, TensorLayout

Scope = Literal["model", "shared"]
Kind = Literal["real", "fraction", "flag", "index"]


@dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter of a method.

    Attributes:
      default: value used where none is given.
      low, high: bounds that a value must keep.
      meaning: one line for tables.
      scope: "model" (one value per model, a scalar stands for all) or "shared" (one value).
      kind: "real"; "fraction" (a share of a tensor's elements, in [0, 1]); "flag" (0 or 1); "index".
      differentiable: whether a gradient says anything (a fraction's and a flag's is 0).
      search: the range that a search covers unless told otherwise; None for [low, high].
      share_of: what a fraction is a share of: "tensor", "model", or one of `LeafMethod.sizes`.
    """

    default: float
    low: float
    high: float
    meaning: str
    scope: Scope = "shared"
    kind: Kind = "real"
    differentiable: bool = True
    search: tuple[float, float] | None = None
    share_of: str = "tensor"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fraction:
    """A fraction as a leaf function sees it.

    Attributes:
      value: float32, [models] or [].
      count: uint32, same shape: floor(value * elements), see `jaxmerge.methods.counting.count`.
    """

    value: jax.Array
    count: jax.Array


def check(
    specs: Mapping[str, Any], given: Mapping[str, Any], models: int, method: str
) -> dict[str, Any]:
    """Completes and validates hyperparameters before any work.

    Nested specs (of `by_block` and `choose`) are checked level by level.

    Args:
      specs: the method's `Hyperparameter` by name, nested where the method nests them.
      given: values: numbers, sequences or 1-D arrays (one number per model), `PerBlock`, tracers of those shapes.
      models: how many models are merged, the base not counted.
      method: the method's name, for messages.

    Returns:
      A value for every spec. Concrete values are float64 NumPy arrays of shape [], [models], or a `PerBlock` of
      them; traced ones stay as they are.

    Raises:
      ValueError: unknown name, wrong length, not finite, out of bounds.
    """
    unknown = [name for name in given if name not in specs]
    if unknown:
        close = difflib.get_close_matches(unknown[0], list(specs), n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{method} has no hyperparameter {unknown[0]!r}{hint} It takes: {', '.join(specs) or 'none'}"
        )
    complete: dict[str, Any] = {}
    for name, spec in specs.items():
        if isinstance(spec, Mapping):
            complete[name] = check(spec, given.get(name, {}), models, f"{method}/{name}")
        else:
            complete[name] = _checked(
                spec, given.get(name, spec.default), models, f"{method}: {name}"
            )
    return complete


def for_tensors(
    specs: Mapping[str, Any],
    values: Mapping[str, Any],
    tensors: Sequence[tuple[str, TensorLayout]],
    sizes: Mapping[str, int],
    models: int,
) -> tuple[dict[str, Any], bool]:
    """Gives the float32 values that a batch of equally shaped tensors sees.

    Args:
      specs, values: as for `check`, which made `values`.
      tensors: path and layout of each leaf in the batch; a stacked leaf stands for its layers.
      sizes: how many elements a "tensor" and a "model" have.
      models: how many models are merged.

    Returns:
      Values by name ([] or [models]; a `Fraction` of them for fractions), and whether they carry a leading axis over
      the batch because some value differs between blocks. Then every value carries it.
    """
    batched = any(
        isinstance(leaf, PerBlock)
        for leaf in jax.tree.leaves(values, is_leaf=lambda x: isinstance(x, PerBlock))
    )
    return _leaf_values(specs, values, tensors, sizes, models, batched), batched


def _leaf_values(
    specs: Mapping[str, Any],
    values: Mapping[str, Any],
    tensors: Sequence[tuple[str, TensorLayout]],
    sizes: Mapping[str, int],
    models: int,
    batched: bool,
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, spec in specs.items():
        value = values[name]
        if isinstance(spec, Mapping):
            result[name] = _leaf_values(spec, value, tensors, sizes, models, batched)
            continue
        per_model = spec.scope == "model"
        if isinstance(value, PerBlock):
            rows = np.array([row for path, layout in tensors for row in value.rows(path, layout)])
            array = value.values[rows]
            if per_model and array.ndim == 1:
                array = _spread(array, (len(rows), models))
        else:
            array = value
            if per_model and array.ndim == 0:
                array = _spread(array, (models,))
            if batched:
                length = sum(len(layout.names) for _, layout in tensors)
                array = array + (jnp if _traced(array) else np).zeros((length, *array.shape))
        result[name] = _as_leaf_value(spec, array, sizes[spec.share_of])
    return result


def _as_leaf_value(spec: Hyperparameter, array: Any, size: int) -> Any:
    # What is concrete stays in NumPy: an eager merge hands these over for every tensor.
    value = array.astype(np.float32)
    if spec.kind == "fraction":
        kept: Any = count(array, size)
        return Fraction(value, kept)
    return value.astype(np.int32) if spec.kind == "index" else value


def _spread(array: Any, shape: tuple[int, ...]) -> Any:
    namespace = jnp if _traced(array) else np
    return namespace.broadcast_to(array[..., None], shape)


def _checked(spec: Hyperparameter, value: Any, models: int, where: str) -> Any:
    if isinstance(value, PerBlock):
        if spec.kind == "fraction" and spec.share_of == "model":
            raise ValueError(
                f"{where} is a share of the whole model and cannot differ between blocks; "
                "use the method with scope='tensor', or by_block"
            )
        shape = value.values.shape
        if spec.scope == "shared" and len(shape) == 2:
            raise ValueError(
                f"{where} is shared by all models, but has values of shape {list(shape)}"
            )
        if len(shape) == 2 and shape[1] != models:
            raise ValueError(
                f"{where} needs {models} values per block (one per model), found {shape[1]}"
            )
        inner = value.values if _traced(value.values) else np.asarray(value.values, np.float64)
        _bounds(spec, inner, where)
        return PerBlock(inner, value.rules, value.blocks)
    if isinstance(value, list | tuple):
        value = (
            jnp.stack(value) if any(_traced(v) for v in value) else np.asarray(value, np.float64)
        )
    elif not _traced(value):
        try:
            value = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            raise ValueError(
                f"{where} needs a number or one number per model, found {value!r}"
            ) from None
    shape = value.shape
    if len(shape) > 1:
        raise ValueError(
            f"{where} needs a number or one number per model, found shape {list(shape)}"
        )
    if len(shape) == 1 and spec.scope == "shared":
        raise ValueError(f"{where} is one number shared by all models, found {shape[0]} values")
    if len(shape) == 1 and shape[0] != models:
        raise ValueError(f"{where} needs {models} values (one per model), found {shape[0]}")
    _bounds(spec, value, where)
    return value


def _bounds(spec: Hyperparameter, value: Any, where: str) -> None:
    if _traced(value) or value.size == 0:
        return
    if not np.all(np.isfinite(value)):
        raise ValueError(f"{where} is not finite: {value.tolist()}")
    if np.any(value < spec.low) or np.any(value > spec.high):
        raise ValueError(
            f"{where} must lie in [{spec.low:g}, {spec.high:g}], found {value.tolist()}"
        )


def _traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)
