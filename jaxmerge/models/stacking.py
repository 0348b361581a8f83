"""Parameters with a subtree per layer, and with all layers stacked on axis 0: the same model in two forms."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxmerge.tree import Layout, TensorLayout, stack, unstack

_LAYER = re.compile(r"layers_(\d+)")
_LAYER_PATH = re.compile(r"^(.*?/)?layers_(\d+)/(.+)$")


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Stacks `layers_0`, `layers_1`, ... of a model's variables into `layers`, on a new axis 0.

    Args:
      params: variables as `init` returns them, {"params": {"layers_0": ...}}.

    Returns:
      The variables that the model reads whose configuration has `stacked=True`.

    Raises:
      ValueError: there is no such layer, or a number is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> layers = {f"layers_{i}": {"kernel": jnp.zeros((2, 3))} for i in range(4)}
      >>> stack_layers({"params": layers})["params"]["layers"]["kernel"].shape
      (4, 2, 3)
    """
    tree = params["params"]
    layers = {int(found[1]): name for name in tree if (found := _LAYER.fullmatch(name))}
    if not layers or sorted(layers) != list(range(len(layers))):
        raise ValueError(f"stacking needs 'layers_0' and on without a gap, found {sorted(tree)}")
    rest = {name: value for name, value in tree.items() if name not in layers.values()}
    stacked = stack([tree[layers[index]] for index in range(len(layers))])
    return {**params, "params": {**rest, "layers": stacked}}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Takes `layers` of a model's variables apart: the inverse of `stack_layers`.

    Raises:
      ValueError: there is no `layers`, or its leaves differ in their leading axis.
    """
    tree = params["params"]
    if "layers" not in tree:
        raise ValueError(f"unstacking needs 'layers', found {sorted(tree)}")
    rest = {name: value for name, value in tree.items() if name != "layers"}
    layers = {f"layers_{i}": one for i, one in enumerate(unstack(tree["layers"]))}
    return {**params, "params": {**rest, **layers}}


def stack_layout(layout: Layout) -> Layout:
    """The layout of `stack_layers(params)` from the one of `params`: merges of both forms are equal.

    Raises:
      ValueError: a tensor's layout differs between layers.

    Example:
      >>> tensors = {f"params/layers_{i}/up/kernel": TensorLayout((f"h.{i}.up",), (1, 0)) for i in range(2)}
      >>> stack_layout(Layout(tensors))["params/layers/up/kernel"].names
      ('h.0.up', 'h.1.up')
    """
    tensors: dict[str, TensorLayout] = {}
    layers: dict[str, dict[int, TensorLayout]] = {}
    for path, tensor in layout.items():
        found = _LAYER_PATH.match(path)
        if found is None:
            tensors[path] = tensor
        else:
            stacked = f"{found[1] or ''}layers/{found[3]}"
            layers.setdefault(stacked, {})[int(found[2])] = tensor
    for path, found_layers in layers.items():
        parts = [found_layers[index] for index in sorted(found_layers)]
        names = tuple(part.names[0] for part in parts)
        depths = tuple(depth for part in parts for depth in part.depths or ())
        common = {replace(part, names=(), depths=None) for part in parts}
        if len(common) > 1:
            raise ValueError(
                f"the layers of {path!r} differ in their layout: {sorted(map(str, common))}"
            )
        tensors[path] = replace(common.pop(), names=names, depths=depths or None, stacked=True)
    return Layout(tensors)
