"""A model's inputs by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.tree import nearest


def named_inputs(
    inputs: Any, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, jax.Array]:
    """Returns a model's inputs by name; a bare array is the only one that the model needs.

    Args:
      inputs: an array, or a mapping of names to arrays.
      required: names that must be there.
      optional: names that may be.

    Returns:
      The inputs that were given.

    Raises:
      ValueError: an input is missing or unknown, or an array is given where several are needed.

    Example:
      >>> named_inputs(jnp.ones((1, 2)), ["input_ids"], ["attention_mask"])
      {'input_ids': Array([[1., 1.]], dtype=float32)}
    """
    if not isinstance(inputs, Mapping):
        if len(required) > 1:
            raise ValueError(f"expected a dict with inputs {_listed(required)}, found one array")
        return {required[0]: jnp.asarray(inputs)}
    for name in required:
        if name not in inputs:
            raise ValueError(f"input {name!r} is missing: found {_listed(sorted(inputs))}")
    for name in inputs:
        if name not in (*required, *optional):
            raise ValueError(
                f"input {name!r} is unknown{nearest(name, [*required, *optional])}: this model takes "
                f"{_listed([*required, *optional])}"
            )
    return {name: jnp.asarray(array) for name, array in inputs.items()}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
