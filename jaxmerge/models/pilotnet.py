"""PilotNet: from a road image to a steering command.

Reference: Bojarski et al., "End to end learning for self-driving cars", 2016.
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax

from jaxmerge.models.activations import ACTIVATIONS
from jaxmerge.models.layers import convolution, dense


class Convolution(NamedTuple):
    """One convolution without padding.

    Attributes:
      width: of its outputs.
      kernel: its side.
      stride: in both directions.
    """

    width: int
    kernel: int
    stride: int


@dataclass(frozen=True)
class PilotNetConfig:
    """What a `PilotNet` is; the defaults are the paper's.

    Attributes:
      image: height and width of the images.
      convolutions: (width, kernel, stride) of each.
      hidden: widths of the hidden dense layers.
      outputs: how many commands: steering alone, or throttle and brake too.
      activation: a key of `ACTIVATIONS`.
      channels: of the images.
      dtype: of the computation.
    """

    image: tuple[int, int] = (66, 200)
    convolutions: tuple[Convolution, ...] = (
        Convolution(24, 5, 2),
        Convolution(36, 5, 2),
        Convolution(48, 5, 2),
        Convolution(64, 3, 1),
        Convolution(64, 3, 1),
    )
    hidden: tuple[int, ...] = (100, 50, 10)
    outputs: int = 1
    activation: str = "elu"
    channels: int = 3
    dtype: str = "float32"

    @property
    def feature_map(self) -> tuple[int, int]:
        """Height and width of what the last convolution gives.

        Example:
          >>> PilotNetConfig().feature_map
          (1, 18)
        """
        height, width = self.image
        for _, kernel, stride in self.convolutions:
            height, width = ((side - kernel) // stride + 1 for side in (height, width))
        return height, width


class PilotNet(nn.Module):
    """Convolutions without padding, then dense layers.

    Example:
      >>> import jax.numpy as jnp
      >>> model = PilotNet(PilotNetConfig((16, 16), ((4, 5, 2), (8, 3, 1)), (6,)))
      >>> images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
      >>> commands, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
      >>> commands.shape
      (2, 1)
    """

    config: PilotNetConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images [batch, *image, channels] -> commands [batch, outputs]."""
        config = self.config
        activation = ACTIVATIONS[config.activation]
        hidden = images.astype(config.dtype)
        for i, (width, kernel, stride) in enumerate(config.convolutions):
            layer = convolution(
                width,
                kernel,
                stride=stride,
                padding=0,
                bias=True,
                name=f"conv_{i}",
                dtype=config.dtype,
            )
            hidden = activation(layer(hidden))
        axes: tuple[int, ...] = (-3, -2, -1)
        for i, width in enumerate((*config.hidden, config.outputs)):
            hidden = activation(hidden) if i else hidden
            hidden = dense(width, axis=axes, name=f"dense_{i}", dtype=config.dtype)(hidden)
            axes = (-1,)
        return hidden
