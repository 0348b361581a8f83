"""Rules of whole layers, and what the shapes of a checkpoint's tensors say about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.converters.families.rules import Rule, Transform, as_is, convolution, linear
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.layers import Norm


def dense(name: str, path: str, *, bias: bool = True) -> list[Rule]:
    """The rules of a `Linear` that is a flax `Dense`."""
    rules = [Rule(f"{name}.weight", f"{path}/kernel", linear())]
    return [*rules, Rule(f"{name}.bias", f"{path}/bias", as_is())] if bias else rules


def flattened_dense(name: str, path: str, features: tuple[int, int, int], width: int) -> list[Rule]:
    """The rules of a `Linear` over a flattened feature map that is a `DenseGeneral` over its three axes.

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
        Rule(f"{name}.weight", f"{path}/kernel", Transform((3, 2, 0, 1), shape)),
        Rule(f"{name}.bias", f"{path}/bias", as_is()),
    ]


def conv(name: str, path: str, *, bias: bool = False) -> list[Rule]:
    """The rules of a `Conv2d`, depthwise or not."""
    rules = [Rule(f"{name}.weight", f"{path}/kernel", convolution())]
    return [*rules, Rule(f"{name}.bias", f"{path}/bias", as_is())] if bias else rules


def norm(name: str, path: str, *, weight: str = "weight", bias: str | None = "bias") -> list[Rule]:
    """The rules of a layer norm, or with no bias of an RMS norm; the names of its vectors in the checkpoint."""
    rules = [Rule(f"{name}.{weight}", f"{path}/scale", as_is())]
    return rules if bias is None else [*rules, Rule(f"{name}.{bias}", f"{path}/bias", as_is())]


def norm_of_kind(name: str, path: str, kind: Norm = "batch") -> list[Rule]:
    """The rules of a norm of images; `path` is that of its parameters."""
    if kind == "none":
        return []
    if kind != "batch":
        return norm(name, path)
    statistics = path.replace("params/", "batch_stats/", 1)
    return [
        *norm(name, path),
        Rule(f"{name}.running_mean", f"{statistics}/mean", as_is()),
        Rule(f"{name}.running_var", f"{statistics}/var", as_is()),
    ]


def embedding(name: str, path: str) -> Rule:
    """The rule of an `Embedding` that is a flax `Embed`."""
    return Rule(f"{name}.weight", f"{path}/embedding", as_is())


def reshaped(*shape: int) -> Transform:
    """The same elements in the same order, in the checkpoint's shape."""
    return Transform(shape=shape)


def attention(qkv: str, out: str, path: str, *, width: int, bias: bool = True) -> list[Rule]:
    """The rules of fused attention that is a `SelfAttention`, whose kernels have an axis for the heads.

    Args:
      qkv: name of the fused projection [3 * width, width]: queries, keys, values, each head by head.
      out: name of the projection that comes out.
      path: of the `SelfAttention` in the tree.
      width: of the tokens.
      bias: whether the fused projection has one.
    """
    fused = Transform((1, 2, 3, 0), (3 * width, width))
    rules = [Rule(f"{qkv}.weight", f"{path}/qkv/kernel", fused)]
    if bias:
        rules.append(Rule(f"{qkv}.bias", f"{path}/qkv/bias", reshaped(3 * width)))
    mixed = Transform((2, 0, 1), (width, width))
    return [
        *rules,
        Rule(f"{out}.weight", f"{path}/out/kernel", mixed),
        Rule(f"{out}.bias", f"{path}/out/bias", as_is()),
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
