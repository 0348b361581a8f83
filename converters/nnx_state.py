"""Between the variables of Flax linen and the `State` of Flax nnx."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.tree import flatten

_KINDS: dict[str, type[nnx.Variable]] = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def to_nnx_state(params: Any) -> nnx.State:
    """Makes an nnx `State` of linen variables: `nnx.update(module, to_nnx_state(params))` puts them into a module.

    Args:
      params: {"params": ...} and "batch_stats" where there are running statistics.

    Returns:
      A state of `nnx.Param` and `nnx.BatchStat` at the variables' paths, without the collection's name.

    Raises:
      CheckpointError: another collection, or two leaves of one path.

    Example:
      >>> import jax.numpy as jnp
      >>> module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> nnx.update(module, to_nnx_state({"params": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}))
      >>> module(jnp.ones((1, 2)))
      Array([[2., 2., 2.]], dtype=float32)
    """
    if not isinstance(params, Mapping):
        raise CheckpointError(f"expected collections of variables, found {type(params).__name__}")
    variables: dict[tuple[str | int, ...], Any] = {}
    for collection, tree in params.items():
        kind = _KINDS.get(collection)
        if kind is None:
            raise CheckpointError(
                f"collection {collection!r}: expected {' or '.join(map(repr, _KINDS))}"
            )
        for path, leaf in flatten(tree)[0].items():
            keys = tuple(_key(part) for part in path.split("/"))
            if keys in variables:
                raise CheckpointError(f"two collections have the leaf {path!r}")
            variables[keys] = kind(leaf)
    return nnx.from_flat_state(variables.items())


def from_nnx_state(state: Any) -> dict[str, Any]:
    """Makes linen variables of an nnx module or its `State`: the inverse of `to_nnx_state`.

    The states of random number generators are left out: no weights are in them.

    Args:
      state: an `nnx.Module`, or what `nnx.state` gives.

    Returns:
      {"params": ...} and "batch_stats" where there are running statistics.

    Raises:
      CheckpointError: a variable that is neither a parameter nor a running statistic.

    Example:
      >>> sorted(from_nnx_state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))["batch_stats"])
      ['mean', 'var']
    """
    if isinstance(state, nnx.Module):
        state = nnx.state(state)
    params: dict[str, Any] = {}
    for keys, variable in nnx.to_flat_state(state):
        if isinstance(variable, nnx.RngState):
            continue
        collection = next(
            (name for name, kind in _KINDS.items() if isinstance(variable, kind)), None
        )
        path = "/".join(map(str, keys))
        if collection is None:
            raise CheckpointError(
                f"{path!r} is a {type(variable).__name__}: expected an nnx.Param or an nnx.BatchStat"
            )
        node = params.setdefault(collection, {})
        for key in keys[:-1]:
            node = node.setdefault(str(key), {})
        node[str(keys[-1])] = variable[...]
    return params


def _key(part: str) -> str | int:
    # nnx numbers the modules of a list.
    return int(part) if part.isdigit() else part
