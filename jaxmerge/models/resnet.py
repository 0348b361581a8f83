"""Residual networks, those for small images and those for ImageNet.

Reference: He et al., "Deep residual learning for image recognition", 2016.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models.layers import Layer, Norm, convolution, dense, max_pool, norm

Block = Literal["basic", "bottleneck"]
Stem = Literal["small", "large"]
Shortcut = Literal["projection", "padded"]

EXPANSION: Mapping[Block, int] = {"basic": 1, "bottleneck": 4}
"""By the kind of block: how much wider than its stage's width its outputs are."""

_IMAGENET: Mapping[int, tuple[Block, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
}


@dataclass(frozen=True)
class ResNetConfig:
    """What a `ResNet` is.

    Attributes:
      blocks: how many blocks each stage has. The first block of every stage but the first halves the image.
      widths: each stage's width; a bottleneck's outputs have four times as many channels.
      classes: how many logits.
      block: "basic" (two convolutions) or "bottleneck" (three, the stride at the second).
      stem: "small" (a 3 x 3 convolution) or "large" (7 x 7 with a stride of 2, then a pooling).
      shortcut: where a block changes the shape: "projection" (a 1 x 1 convolution and a norm), or "padded" (every
        second pixel, zeros for the new channels; no parameters).
      norm: "batch", "group" or "layer".
      groups: of a group norm.
      channels: of the images.
      dtype: of the computation.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    classes: int = 10
    block: Block = "basic"
    stem: Stem = "small"
    shortcut: Shortcut = "projection"
    norm: Norm = "batch"
    groups: int = 8
    channels: int = 3
    dtype: str = "float32"

    @classmethod
    def cifar(
        cls,
        depth: int,
        *,
        width: int = 16,
        classes: int = 10,
        norm: Norm = "batch",
        shortcut: Shortcut = "projection",
    ) -> Self:
        """ResNet-20, 26, 32, 50, 56, ...: 6n + 2 layers in three stages.

        Args:
          depth: 6n + 2.
          width: of the first stage; the others are twice and four times as wide.
          classes: how many logits.
          norm: the kind of normalisation.
          shortcut: "projection" or "padded".

        Example:
          >>> config = ResNetConfig.cifar(20, width=32)
          >>> config.blocks, config.widths
          ((3, 3, 3), (32, 64, 128))
        """
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers (20, 26, 32, 50, ...), not {depth}")
        blocks = ((depth - 2) // 6,) * 3
        return cls(blocks, (width, 2 * width, 4 * width), classes, norm=norm, shortcut=shortcut)

    @classmethod
    def imagenet(cls, depth: int, *, classes: int = 1000, stem: Stem = "large") -> Self:
        """ResNet-18, 34, 50 or 101; with the stem "small" for CIFAR's images."""
        if depth not in _IMAGENET:
            raise ValueError(f"depth {depth} is none of {', '.join(map(str, _IMAGENET))}")
        block, blocks = _IMAGENET[depth]
        return cls(blocks, (64, 128, 256, 512), classes, block, stem)

    def in_channels(self, stage: int, i: int) -> int:
        """Channels that a block takes."""
        if i:
            return self.out_channels(stage)
        return self.out_channels(stage - 1) if stage else self.widths[0]

    def out_channels(self, stage: int) -> int:
        """Channels that a stage's blocks give."""
        return self.widths[stage] * EXPANSION[self.block]

    def stride(self, stage: int, i: int) -> int:
        """A block's stride."""
        return 2 if stage and not i else 1

    def changes_shape(self, stage: int, i: int) -> bool:
        """Whether a block's outputs have another shape than its inputs."""
        return self.stride(stage, i) != 1 or self.in_channels(stage, i) != self.out_channels(stage)


class ResNet(nn.Module):
    """A residual network.

    Example:
      >>> model = ResNet(ResNetConfig.cifar(8, width=4))
      >>> images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
      >>> logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
      >>> logits.shape
      (2, 10)
    """

    config: ResNetConfig

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images [batch, height, width, channels] -> logits [batch, classes]; `train` is static."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        side, stride = (7, 2) if config.stem == "large" else (3, 1)
        stem = convolution(config.widths[0], side, stride=stride, name="conv1", dtype=config.dtype)
        hidden = nn.relu(_norm(config, train, "norm1")(stem(images.astype(dtype))))
        if config.stem == "large":
            hidden = max_pool(hidden, 3, 2, 1)
        for stage, count in enumerate(config.blocks):
            for i in range(count):
                block = ResNetBlock(config, stage, i, name=f"stage{stage + 1}_{i}")
                hidden = block(hidden, train)
        pooled = jnp.mean(hidden, axis=(1, 2))
        return dense(config.classes, name="head", dtype=config.dtype)(pooled)


class ResNetBlock(nn.Module):
    """One residual block: basic, or a bottleneck."""

    config: ResNetConfig
    stage: int
    i: int

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """inputs [batch, height, width, in channels] -> [batch, height / stride, width / stride, out channels]."""
        config, stride = self.config, self.config.stride(self.stage, self.i)
        normalise, width = partial(_norm, config, train), config.widths[self.stage]
        outputs = config.out_channels(self.stage)
        # (channels, kernel, stride) of the block's convolutions.
        layers = [(width, 3, stride), (width, 3, 1)]
        if config.block == "bottleneck":
            layers = [(width, 1, 1), (width, 3, stride), (outputs, 1, 1)]
        hidden = inputs
        for n, (channels, side, step) in enumerate(layers, start=1):
            hidden = nn.relu(hidden) if n > 1 else hidden
            hidden = convolution(channels, side, stride=step, name=f"conv{n}", dtype=config.dtype)(
                hidden
            )
            hidden = normalise(f"norm{n}")(hidden)
        if config.changes_shape(self.stage, self.i):
            inputs = self._shortcut(inputs, outputs, stride, normalise)
        return nn.relu(hidden + inputs)

    def _shortcut(
        self, inputs: jax.Array, outputs: int, stride: int, normalise: partial[Layer]
    ) -> jax.Array:
        if self.config.shortcut == "padded":
            extra = outputs - inputs.shape[-1]
            pads = [(0, 0)] * 3 + [(extra // 2, extra - extra // 2)]
            return jnp.pad(inputs[:, ::stride, ::stride], pads)
        projection = convolution(
            outputs, 1, stride=stride, name="shortcut_conv", dtype=self.config.dtype
        )
        return normalise("shortcut_norm")(projection(inputs))


def _norm(config: ResNetConfig, train: bool, name: str) -> Layer:
    return norm(config.norm, name=name, dtype=config.dtype, train=train, groups=config.groups)
