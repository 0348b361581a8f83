"""Checks models before a merge: same tensors, same shapes, same kinds, enough of them."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.methods.leaf import LeafMethod
from jaxmerge.tree import flatten


def check_count(leaf: LeafMethod, models: int, has_base: bool) -> None:
    """Raises a ValueError where the method takes another number of models, or needs a base."""
    if models == 0:
        raise ValueError(f"{leaf.name} needs at least one model, found an empty list")
    if leaf.base == "required" and not has_base:
        raise ValueError(f"{leaf.name} works on task vectors and needs base=")
    low, high = leaf.models
    counts_base = leaf.base == "source" and has_base
    found = models + counts_base
    if found < low or (high is not None and found > high):
        wanted = (
            str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"
        )
        counted = ", the base counted" if leaf.base == "source" else ""
        raise ValueError(f"{leaf.name} takes {wanted} model(s){counted}, found {found}")


def flatten_all(
    models: Sequence[Any], base: Any
) -> tuple[list[dict[str, Any]], dict[str, Any] | None, Any]:
    """Flattens all trees and checks that they hold the same tensors.

    Returns:
      The models' leaves by path, the base's, and the tree definition of the base (or of the first model).

    Raises:
      ValueError: a missing or additional tensor, different shapes, or a float tensor beside an integer one; the
        message names the tensor, the model, what was expected and what was found.
    """
    flat = [flatten(model) for model in models]
    flat_base = None if base is None else flatten(base)
    reference, definition = flat[0] if flat_base is None else flat_base
    reference_name = "models[0]" if flat_base is None else "base"
    for i, (leaves, _) in enumerate(flat):
        _check_same(reference, leaves, reference_name, f"models[{i}]")
    return [leaves for leaves, _ in flat], None if flat_base is None else flat_base[0], definition


def is_mergeable(leaf: Any) -> bool:
    """Floating-point tensors with at least one element are merged; the others are carried over."""
    return jnp.issubdtype(dtype_of(leaf), jnp.floating) and leaf_size(leaf) > 0


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, of a NumPy scalar or of a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.result_type(leaf)


def leaf_size(leaf: Any) -> int:
    """Number of elements."""
    return math.prod(np.shape(leaf))


def _check_same(
    reference: dict[str, Any], leaves: dict[str, Any], reference_name: str, name: str
) -> None:
    missing = [path for path in reference if path not in leaves]
    extra = [path for path in leaves if path not in reference]
    if missing:
        near = difflib.get_close_matches(missing[0], extra or list(leaves), n=1, cutoff=0.6)
        hint = f"; the nearest name there is {near[0]!r}" if near else ""
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"{name} lacks tensor {missing[0]!r} of {reference_name}{more}{hint}")
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise ValueError(f"{name} has tensor {extra[0]!r}{more}, which {reference_name} lacks")
    for path, expected in reference.items():
        found = leaves[path]
        if np.shape(expected) != np.shape(found):
            raise ValueError(
                f"tensor {path!r}: {reference_name} has shape {list(np.shape(expected))}, "
                f"{name} has {list(np.shape(found))}"
            )
        one, other = dtype_of(expected), dtype_of(found)
        for dtype, owner in ((one, reference_name), (other, name)):
            if jnp.issubdtype(dtype, jnp.complexfloating):
                raise ValueError(
                    f"tensor {path!r} of {owner} is complex ({dtype}), which no method merges"
                )
        if jnp.issubdtype(one, jnp.floating) != jnp.issubdtype(other, jnp.floating):
            raise ValueError(
                f"tensor {path!r}: {reference_name} has dtype {one}, {name} has {other}"
            )
