"""Layers that the families share, with the semantics of PyTorch's."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.models.attention import attend
from jaxmerge.models.linear import precision_of

Norm = Literal["batch", "group", "layer", "none"]
"""Kinds of normalisation: over the batch with running statistics; over groups of channels; over the channels of each
pixel; none."""

MOMENTUM = 0.9
"""Share of the old running statistics that a training step keeps, as Flax counts it; PyTorch's 0.1 is the same."""

Layer = Callable[[jax.Array], jax.Array]


def convolution(
    features: int,
    kernel: int,
    *,
    name: str,
    dtype: str,
    stride: int = 1,
    bias: bool = False,
    padding: int | str | None = None,
) -> nn.Conv:
    """A convolution of images with a square kernel.

    Args:
      features: channels that come out.
      kernel: its side.
      name: in the tree.
      dtype: of the computation.
      stride: in both directions.
      bias: whether it has one.
      padding: pixels at each border; None: kernel // 2; "SAME": as TensorFlow does it, more at the end.
    """
    at_borders = kernel // 2 if padding is None else padding
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        at_borders if isinstance(at_borders, str) else [(at_borders, at_borders)] * 2,
        use_bias=bias,
        dtype=jnp.dtype(dtype),
        precision=precision_of(dtype),
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )


def dense(
    features: int | Sequence[int],
    *,
    name: str,
    dtype: str,
    axis: int | Sequence[int] = -1,
    bias: bool = True,
) -> nn.DenseGeneral:
    """A linear map of the axes `axis` to so many features, on one axis or several."""
    return nn.DenseGeneral(
        features,
        axis,
        use_bias=bias,
        dtype=jnp.dtype(dtype),
        precision=precision_of(dtype),
        name=name,
    )


class DepthwiseConvolution(nn.Module):
    """A convolution of each channel by itself, as a sum over the kernel's taps.

    The compilers' grouped convolutions are slow on CPUs (6 to 30 times slower at the shapes of EfficientNet-Lite0), and
    slower yet where `jax.vmap` gives every candidate of a population its own kernels.

    Attributes:
      kernel: its side.
      stride: in both directions.
      padding: "SYMMETRIC": kernel // 2 pixels at each border; "SAME": as TensorFlow does it, more at the end.
      dtype: of the computation.
    """

    kernel: int
    stride: int = 1
    padding: str = "SYMMETRIC"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images [batch, height, width, channels] -> [batch, height / stride, width / stride, channels]."""
        side, stride, channels = self.kernel, self.stride, images.shape[-1]
        kernel = self.param("kernel", nn.initializers.he_normal(), (side, side, 1, channels))
        pads = [self._pads(size) for size in images.shape[1:3]]
        images = jnp.pad(images.astype(self.dtype), [(0, 0), *pads, (0, 0)])
        batch, height, width, _ = images.shape
        weights = kernel.astype(self.dtype).reshape(side**2, 1, 1, channels)

        def tap(i: int, j: int) -> jax.Array:
            end = (batch, height - side + 1 + i, width - side + 1 + j, channels)
            part = jax.lax.slice(images, (0, i, j, 0), end, (1, stride, stride, 1))
            return part * jax.lax.slice_in_dim(weights, i * side + j, i * side + j + 1)

        return functools.reduce(jnp.add, itertools.starmap(tap, np.ndindex(side, side)))

    def _pads(self, size: int) -> tuple[int, int]:
        if self.padding == "SYMMETRIC":
            return self.kernel // 2, self.kernel // 2
        total = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
        return total // 2, total - total // 2


def norm(
    kind: Norm, *, name: str, dtype: str, train: bool, groups: int = 8, epsilon: float = 1e-5
) -> Layer:
    """A normalisation; with `train` a batch norm normalises by its batch and moves its statistics.

    PyTorch moves the running variance by the unbiased variance of the batch, Flax by the biased one; nothing else
    differs.
    """
    options: dict[str, Any] = {"epsilon": epsilon, "dtype": jnp.dtype(dtype), "name": name}
    if kind == "batch":
        return nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, **options)
    if kind == "group":
        return nn.GroupNorm(num_groups=groups, use_fast_variance=False, **options)
    if kind == "layer":
        return nn.LayerNorm(use_fast_variance=False, **options)
    if kind == "none":
        return lambda inputs: inputs
    raise ValueError(f"norm {kind!r} is none of {', '.join(get_args(Norm))}")


def max_pool(images: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """Maxima over square windows; the border adds nothing."""
    return nn.max_pool(images, (window, window), (stride, stride), [(padding, padding)] * 2)


def adaptive_mean_pool(images: jax.Array, size: int) -> jax.Array:
    """Means over size x size windows that cover the image, as PyTorch's `AdaptiveAvgPool2d` cuts it.

    Example:
      >>> adaptive_mean_pool(jnp.arange(6.0).reshape(1, 3, 2, 1), 2)[0, :, :, 0]
      Array([[1., 2.],
             [3., 4.]], dtype=float32)
    """
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    if size == 1:
        return jnp.mean(images, axis=(1, 2), keepdims=True)
    rows, columns = _windows(height, size), _windows(width, size)
    precision = precision_of(images.dtype.name)
    pooled = jnp.einsum("ih,jw,nhwc->nijc", rows, columns, images, precision=precision)
    return pooled.astype(images.dtype)


class SelfAttention(nn.Module):
    """Softmax attention among all tokens; queries, keys and values in one fused kernel [width, 3, heads, head].

    Attributes:
      heads: how many.
      bias: whether the fused projection has a bias; the one that comes out always has.
      dtype: of the computation; the softmax is in float32.
    """

    heads: int
    bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [batch, n, width] -> [batch, n, width]."""
        width = tokens.shape[-1]
        if width % self.heads:
            raise ValueError(f"a width of {width} is no multiple of {self.heads} heads")
        head = width // self.heads
        project = dense((3, self.heads, head), bias=self.bias, name="qkv", dtype=self.dtype)
        fused = project(tokens)
        query, key, value = (fused[:, :, i] for i in range(3))
        mixed = attend(query, key, value, scale=head**-0.5)
        return dense(width, axis=(-2, -1), name="out", dtype=self.dtype)(mixed)


def _windows(length: int, size: int) -> jax.Array:
    """[size, length]: row i holds the weights of window i."""
    i, at = jnp.arange(size)[:, None], jnp.arange(length)[None]
    inside = (at >= i * length // size) & (at < -(-(i + 1) * length // size))
    return inside / jnp.sum(inside, axis=1, keepdims=True)
