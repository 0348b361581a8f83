"""Rules of whole layers, and what the shapes of a checkpoint's tensors say about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.converters.families.rules import Rule, Transform, as_is, convolution, linear
from jaxmerge.converters.tensor_info import TensorInfo


def dense(name: str, path: str) -> list[Rule]:
    """A `Linear` with a bias as a `Dense`."""
    return [
        Rule(f"{name}.weight", f"params/{path}/kernel", linear()),
        Rule(f"{name}.bias", f"params/{path}/bias", as_is()),
    ]


def flattened_dense(name: str, path: str, features: tuple[int, int, int], width: int) -> list[Rule]:
    """A `Linear` over a flattened feature map as a `DenseGeneral` over its three axes.

    PyTorch flattens channels before rows before columns; the kernel here is [height, width, channels, out].

    Args:
      name: in the checkpoint.
      path: in the tree.
      features: height, width and channels of the map.
      width: of the outputs.
    """
    height, columns, channels = features
    shape = (width, channels * height * columns)
    return [
        Rule(f"{name}.weight", f"params/{path}/kernel", Transform((3, 2, 0, 1), shape)),
        Rule(f"{name}.bias", f"params/{path}/bias", as_is()),
    ]


def conv(name: str, path: str, *, bias: bool = False) -> list[Rule]:
    """A `Conv2d`, depthwise or not."""
    rules = [Rule(f"{name}.weight", f"params/{path}/kernel", convolution())]
    return [*rules, Rule(f"{name}.bias", f"params/{path}/bias", as_is())] if bias else rules


def norm(name: str, path: str, kind: str = "batch") -> list[Rule]:
    """A normalisation out of `jaxmerge.models.layers.Norm`."""
    if kind == "none":
        return []
    rules = [
        Rule(f"{name}.weight", f"params/{path}/scale", as_is()),
        Rule(f"{name}.bias", f"params/{path}/bias", as_is()),
    ]
    if kind == "batch":
        rules += [
            Rule(f"{name}.running_mean", f"batch_stats/{path}/mean", as_is()),
            Rule(f"{name}.running_var", f"batch_stats/{path}/var", as_is()),
        ]
    return rules


def attention(qkv: str, out: str, path: str, *, width: int, bias: bool = True) -> list[Rule]:
    """Fused attention as a `SelfAttention`, whose kernels have an axis for the heads.

    Args:
      qkv: name of the fused projection [3 * width, width]: queries, keys, values, each head by head.
      out: name of the projection that comes out.
      path: of the `SelfAttention` in the tree.
      width: of the tokens.
      bias: whether the fused projection has one.
    """
    fused = Transform((1, 2, 3, 0), (3 * width, width))
    rules = [Rule(f"{qkv}.weight", f"params/{path}/qkv/kernel", fused)]
    if bias:
        shape = Transform(shape=(3 * width,))
        rules.append(Rule(f"{qkv}.bias", f"params/{path}/qkv/bias", shape))
    mixed = Transform((2, 0, 1), (width, width))
    return [
        *rules,
        Rule(f"{out}.weight", f"params/{path}/out/kernel", mixed),
        Rule(f"{out}.bias", f"params/{path}/out/bias", as_is()),
    ]


def images(height: int, width: int, channels: int) -> jax.ShapeDtypeStruct:
    """One image, for finding the shapes of a module's leaves."""
    return jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)


def shape_of(tensors: Mapping[str, TensorInfo], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that a layout must have.

    Raises:
      CheckpointError: there is no such tensor, or it has another number of dimensions.
    """
    info = tensors.get(name)
    if info is None:
        raise CheckpointError(f"no tensor {name!r}.{nearest(name, tensors)}")
    if len(info.shape) != dimensions:
        raise CheckpointError(
            f"tensor {name!r}: expected {dimensions} dimensions, found shape {list(info.shape)}"
        )
    return info.shape


def shapes_of(
    tensors: Mapping[str, TensorInfo], name_of: Callable[[int], str], dimensions: int
) -> list[tuple[int, ...]]:
    """The shapes of numbered tensors, from 0 as far as they go.

    Raises:
      CheckpointError: there is no first one, or one has another number of dimensions.
    """
    shapes = [shape_of(tensors, name_of(0), dimensions)]
    while name_of(len(shapes)) in tensors:
        shapes.append(shape_of(tensors, name_of(len(shapes)), dimensions))
    return shapes


def norm_kind(tensors: Mapping[str, TensorInfo], name: str, given: Mapping[str, Any]) -> str:
    """The kind of a normalisation: batch norms have running statistics; a config must tell the others apart.

    Raises:
      CheckpointError: a norm without running statistics, and no `norm` in `given`.
    """
    if "norm" in given:
        return given["norm"]
    if f"{name}.running_mean" in tensors:
        return "batch"
    if f"{name}.weight" in tensors:
        raise CheckpointError(
            f"{name!r} has no running statistics: a group norm or a layer norm; say which: "
            'config={"norm": "group", "groups": 8} or {"norm": "layer"}'
        )
    return "none"
