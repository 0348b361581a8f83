"""Stacks trees of equal structure along a new leading axis, and takes them apart."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def stack(trees: Sequence[Any]) -> Any:
    """Stacks trees leaf by leaf along a new axis 0.

    Args:
      trees: one or more pytrees of equal structure, shapes and dtypes.

    Returns:
      One tree whose leaves have a leading axis of ``len(trees)``.

    Raises:
      ValueError: no tree, or trees of different structure.

    Example:
      >>> stack([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])["w"].shape
      (2, 3)
    """
    if not trees:
        raise ValueError("stack needs at least one tree")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any) -> list[Any]:
    """Takes a stacked tree apart: the inverse of `stack`.

    Example:
      >>> [float(t["w"][0]) for t in unstack({"w": jnp.array([[1.0], [2.0]])})]
      [1.0, 2.0]
    """
    leaves, definition = jax.tree.flatten(tree)
    if not leaves:
        raise ValueError("a tree without leaves cannot be unstacked")
    lengths = {leaf.shape[0] for leaf in leaves}
    if len(lengths) != 1:
        raise ValueError(f"leaves differ in their leading axis: {sorted(lengths)}")
    return [
        jax.tree.unflatten(definition, [leaf[i] for leaf in leaves]) for i in range(lengths.pop())
    ]
