"""An adapter in memory: what it adds to which tensor, and adding it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.converters.lora.factors import LowRank
from jaxmerge.converters.peft_adapter import find_target
from jaxmerge.tree import Layout, TensorLayout, flatten, unflatten


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter; a pytree.

    Attributes:
      updates: tensor's name -> what is added to it.
      replaced: tensor's name -> what takes its place before anything is added: modules that were trained whole.
      magnitudes: tensor's name -> DoRA's magnitudes [rows]: W becomes m (W + update) / ||W + update||, row by row.
      base_model: static; the name of the model that it was trained on, or None.
      task_type: static; PEFT's, as "CAUSAL_LM", or None.
    """

    updates: Mapping[str, LowRank]
    replaced: Mapping[str, jax.Array] = field(default_factory=dict)
    magnitudes: Mapping[str, jax.Array] = field(default_factory=dict)
    base_model: str | None = field(default=None, metadata={"static": True})
    task_type: str | None = field(default=None, metadata={"static": True})


def task_vectors(adapter: LoraAdapter) -> dict[str, jax.Array]:
    """The dense task vectors: what the adapter adds to each tensor.

    Args:
      adapter: without replaced tensors and magnitudes, whose task vectors depend on the base: apply it there.

    Returns:
      Tensor's name -> float32 array of the tensor's shape.

    Raises:
      ValueError: the adapter has replaced tensors or magnitudes.

    Example:
      >>> update = LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), (2, 3))
      >>> task_vectors(LoraAdapter({"fc.weight": update}))["fc.weight"].shape
      (2, 3)
    """
    check_only_updates(adapter, "have no task vectors without the base: use apply_lora")
    return {name: update.dense() for name, update in adapter.updates.items()}


def apply_lora(
    model: Any, adapter: LoraAdapter, *, scale: Any = 1.0, layout: Layout | None = None
) -> Any:
    """Merges an adapter into a model.

    Args:
      model: a flat dict of a checkpoint's tensors, or any pytree with a layout, such as `load_model` returns.
      adapter: what to add; its names may have more or fewer prefixes than the model's.
      scale: times each update, a number that may be traced; replaced tensors are taken whole.
      layout: how leaves relate to the checkpoint's tensors; None: a leaf's path is the tensor's name.

    Returns:
      A model of the same structure, shapes and dtypes; the sums are computed in float32.

    Raises:
      CheckpointError: the model has no such tensor, or one of another shape.

    Example:
      >>> update = LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)), (2, 2))
      >>> apply_lora({"fc.weight": jnp.eye(2)}, LoraAdapter({"fc.weight": update}), scale=0.5)["fc.weight"]
      Array([[1.5, 0.5],
             [0.5, 1.5]], dtype=float32)
    """
    leaves, definition = flatten(model)
    layout = layout or Layout()
    places = _places(leaves, layout)
    changed: dict[str, dict[int, jax.Array]] = {}
    for name in {**adapter.updates, **adapter.replaced}:
        target = find_target(name, places)
        if target is None:
            raise CheckpointError(
                f"the adapter changes {name!r}, which the model does not have."
                f"{nearest(name, places)}"
            )
        path, index = places[target]
        changed.setdefault(path, {})[index] = _changed(
            name, adapter, _layer(leaves[path], layout.of(path), index), layout.of(path), scale
        )
    result = dict(leaves)
    for path, layers in changed.items():
        leaf = leaves[path]
        if not layout.of(path).stacked:
            result[path] = layers[0].astype(leaf.dtype)
            continue
        stacked = [layers.get(i, leaf[i]).astype(leaf.dtype) for i in range(leaf.shape[0])]
        result[path] = jnp.stack(stacked)
    return unflatten(definition, (result[path] for path in leaves))


def check_only_updates(adapter: LoraAdapter, reason: str) -> None:
    """Raises a ValueError if the adapter replaces tensors or has magnitudes."""
    for what, names in (
        ("tensors trained whole", adapter.replaced),
        ("DoRA's magnitudes", adapter.magnitudes),
    ):
        if names:
            raise ValueError(f"{what} (such as {next(iter(names))!r}) {reason}")


def _places(leaves: Mapping[str, Any], layout: Layout) -> dict[str, tuple[str, int]]:
    """Returns tensor's name -> the leaf's path and the layer in it."""
    return {
        name: (path, index) for path in leaves for index, name in enumerate(layout.of(path).names)
    }


def _layer(leaf: Any, layout: TensorLayout, index: int) -> jax.Array:
    return jnp.asarray(leaf[index] if layout.stacked else leaf)


def _changed(
    name: str, adapter: LoraAdapter, leaf: jax.Array, layout: TensorLayout, scale: Any
) -> jax.Array:
    """One layer of a leaf with the adapter in it, in float32."""
    tensor = layout.to_checkpoint(leaf).astype(jnp.float32)
    if name in adapter.replaced:
        new = jnp.asarray(adapter.replaced[name])
        _check_shape(name, new.shape, tensor.shape)
        tensor = new.astype(jnp.float32)
    if name in adapter.updates:
        update = adapter.updates[name]
        _check_shape(name, update.shape, tensor.shape)
        tensor = tensor + scale * update.dense()
    if name in adapter.magnitudes:
        norms = jnp.linalg.norm(tensor, axis=1, keepdims=True)
        tensor = tensor * (adapter.magnitudes[name].astype(jnp.float32)[:, None] / norms)
    return layout.from_checkpoint(tensor, leaf.shape)


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CheckpointError(
            f"the adapter's {name!r} has shape {list(found)}, the model's {list(expected)}"
        )
