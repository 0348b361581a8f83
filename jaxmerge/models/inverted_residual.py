"""Networks of inverted residual blocks with ReLU6: MobileNetV2 and EfficientNet-Lite.

References: Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", 2018; Tan and Le, "EfficientNet",
2019, in the form without squeeze-and-excitation.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models.layers import DepthwiseConvolution, convolution, dense, norm

Padding = Literal["symmetric", "same"]


class Stage(NamedTuple):
    """Blocks of one shape, as the papers' tables list them; the first has the stride.

    Attributes:
      expansion: of the hidden width over the incoming one.
      width: of the outputs.
      repeats: how many blocks.
      stride: of the first.
      kernel: side of the depthwise kernel.
    """

    expansion: int
    width: int
    repeats: int
    stride: int
    kernel: int = 3


MOBILENET_V2 = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)
EFFICIENTNET_LITE0 = (
    Stage(1, 16, 1, 1, 3),
    Stage(6, 24, 2, 2, 3),
    Stage(6, 40, 2, 2, 5),
    Stage(6, 80, 3, 2, 3),
    Stage(6, 112, 3, 1, 5),
    Stage(6, 192, 4, 2, 5),
    Stage(6, 320, 1, 1, 3),
)


class Block(NamedTuple):
    """One inverted residual block.

    Attributes:
      hidden: its hidden width; equal to the incoming width: no expansion.
      width: of its outputs.
      stride: of its depthwise convolution.
      kernel: side of the depthwise kernel.
    """

    hidden: int
    width: int
    stride: int
    kernel: int


@dataclass(frozen=True)
class InvertedResidualConfig:
    """What an `InvertedResidualNet` is.

    Attributes:
      stem: width of the first convolution, which halves the image.
      blocks: (hidden width, width, stride, kernel) of each block.
      last: width of the last 1 x 1 convolution.
      classes: how many logits.
      padding: "symmetric", as PyTorch pads, or "same", as TensorFlow does.
      epsilon: of the batch norms.
      channels: of the images.
      dtype: of the computation.
    """

    stem: int
    blocks: tuple[Block, ...]
    last: int
    classes: int = 1000
    padding: Padding = "symmetric"
    epsilon: float = 1e-5
    channels: int = 3
    dtype: str = "float32"

    @classmethod
    def of_stages(
        cls,
        stages: tuple[Stage, ...],
        *,
        stem: int = 32,
        last: int = 1280,
        width: float = 1.0,
        classes: int = 1000,
        padding: Padding = "symmetric",
        epsilon: float = 1e-5,
    ) -> Self:
        """Lays out a table of stages.

        Args:
          stages: the table.
          stem: width of the stem at a multiplier of 1.
          last: width of the last convolution; multipliers below 1 leave it as it is.
          width: the multiplier of all widths, which are rounded to multiples of 8.
          classes: how many logits.
          padding: as the attribute.
          epsilon: as the attribute.

        Example:
          >>> InvertedResidualConfig.of_stages(MOBILENET_V2).blocks[1]
          Block(hidden=96, width=24, stride=2, kernel=3)
        """
        stem = _rounded(stem * width)
        blocks, incoming = [], stem
        for stage in stages:
            for i in range(stage.repeats):
                outgoing = _rounded(stage.width * width)
                stride = stage.stride if i == 0 else 1
                blocks.append(Block(incoming * stage.expansion, outgoing, stride, stage.kernel))
                incoming = outgoing
        last = _rounded(last * max(width, 1.0))
        return cls(stem, tuple(blocks), last, classes, padding, epsilon)

    @classmethod
    def mobilenet_v2(cls, *, width: float = 1.0, classes: int = 1000) -> Self:
        """MobileNetV2."""
        return cls.of_stages(MOBILENET_V2, width=width, classes=classes)

    @classmethod
    def efficientnet_lite0(cls, *, classes: int = 1000) -> Self:
        """EfficientNet-Lite0."""
        return cls.of_stages(EFFICIENTNET_LITE0, classes=classes, padding="same", epsilon=1e-3)

    def incoming(self, i: int) -> int:
        """Channels that block i takes."""
        return self.blocks[i - 1][1] if i else self.stem


class ConvolutionNorm(nn.Module):
    """A convolution, of all channels or depthwise, and a batch norm."""

    config: InvertedResidualConfig
    features: int
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """images [batch, height, width, channels] -> [batch, height / stride, width / stride, features]."""
        config, same = self.config, self.config.padding == "same"
        layer: nn.Module
        if self.depthwise:
            padding = "SAME" if same else "SYMMETRIC"
            layer = DepthwiseConvolution(
                self.kernel, self.stride, padding, config.dtype, name="conv"
            )
        else:
            layer = convolution(
                self.features,
                self.kernel,
                stride=self.stride,
                padding="SAME" if same else None,
                name="conv",
                dtype=config.dtype,
            )
        normalise = norm(
            "batch", name="norm", dtype=config.dtype, train=train, epsilon=config.epsilon
        )
        return normalise(layer(images))


class InvertedResidualNet(nn.Module):
    """A network of inverted residual blocks.

    Example:
      >>> config = InvertedResidualConfig(4, ((4, 4, 1, 3), (16, 8, 2, 5)), 16, classes=3)
      >>> model = InvertedResidualNet(config)
      >>> images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
      >>> logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
      >>> logits.shape
      (2, 3)
    """

    config: InvertedResidualConfig

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images [batch, height, width, channels] -> logits [batch, classes]; `train` is static."""
        config = self.config
        layer = partial(ConvolutionNorm, config)
        stem = layer(config.stem, 3, 2, name="stem")
        hidden = nn.relu6(stem(images.astype(config.dtype), train))
        for i, (width, outgoing, stride, kernel) in enumerate(config.blocks):
            inputs, incoming = hidden, config.incoming(i)
            if width != incoming:
                hidden = nn.relu6(layer(width, name=f"block_{i}_expand")(hidden, train))
            depthwise = layer(width, kernel, stride, True, name=f"block_{i}_depthwise")
            hidden = nn.relu6(depthwise(hidden, train))
            hidden = layer(outgoing, name=f"block_{i}_project")(hidden, train)
            if stride == 1 and incoming == outgoing:
                hidden = hidden + inputs
        hidden = nn.relu6(layer(config.last, name="last")(hidden, train))
        pooled = jnp.mean(hidden, axis=(1, 2))
        return dense(config.classes, name="head", dtype=config.dtype)(pooled)


def _rounded(width: float) -> int:
    """To a multiple of 8, at least 8 and never by more than a tenth down."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded
