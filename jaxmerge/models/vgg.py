"""VGG: stages of 3 x 3 convolutions, each with a pooling after it, and a classifier of dense layers.

Reference: Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", 2015.
"""

from dataclasses import dataclass
from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models.layers import Norm, adaptive_mean_pool, convolution, dense, max_pool, norm

_CONVOLUTIONS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_WIDTHS = (64, 128, 256, 512, 512)


@dataclass(frozen=True)
class VGGConfig:
    """What a `VGG` is.

    Attributes:
      stages: the widths of the convolutions, stage by stage.
      hidden: widths of the classifier's hidden layers; () for one dense layer alone.
      classes: how many logits.
      pool: side of the feature map that the classifier sees; others are averaged down to it.
      norm: "batch", "group", "layer" or "none", after every convolution.
      groups: of a group norm.
      channels: of the images.
      dtype: of the computation.
    """

    stages: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...] = ()
    classes: int = 10
    pool: int = 1
    norm: Norm = "batch"
    groups: int = 8
    channels: int = 3
    dtype: str = "float32"

    @classmethod
    def cifar(
        cls, depth: int, *, width: float = 1.0, classes: int = 10, norm: Norm = "batch"
    ) -> Self:
        """VGG-11, 13, 16 or 19 for 32 x 32 images: one dense layer after the convolutions.

        Example:
          >>> VGGConfig.cifar(11, width=0.25).stages
          ((16,), (32,), (64, 64), (128, 128), (128, 128))
        """
        return cls(_stages(depth, width), classes=classes, norm=norm)

    @classmethod
    def imagenet(cls, depth: int, *, classes: int = 1000, norm: Norm = "none") -> Self:
        """VGG-11, 13, 16 or 19 for 224 x 224 images."""
        return cls(_stages(depth, 1.0), (4096, 4096), classes, 7, norm)


class VGG(nn.Module):
    """A VGG network.

    Example:
      >>> model = VGG(VGGConfig(((8,), (8, 16)), classes=4))
      >>> images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
      >>> logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
      >>> logits.shape
      (2, 4)
    """

    config: VGGConfig

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images [batch, height, width, channels] -> logits [batch, classes]; `train` is static."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        hidden = images.astype(dtype)
        for stage, widths in enumerate(config.stages):
            for i, width in enumerate(widths):
                at = f"{stage}_{i}"
                hidden = convolution(width, 3, bias=True, name=f"conv{at}", dtype=config.dtype)(
                    hidden
                )
                hidden = norm(
                    config.norm,
                    name=f"norm{at}",
                    dtype=config.dtype,
                    train=train,
                    groups=config.groups,
                )(hidden)
                hidden = nn.relu(hidden)
            hidden = max_pool(hidden, 2, 2)
        hidden = adaptive_mean_pool(hidden, config.pool)
        axes: tuple[int, ...] = (-3, -2, -1)
        for i, width in enumerate((*config.hidden, config.classes)):
            hidden = nn.relu(hidden) if i else hidden
            hidden = dense(width, axis=axes, name=f"dense_{i}", dtype=config.dtype)(hidden)
            axes = (-1,)
        return hidden


def _stages(depth: int, width: float) -> tuple[tuple[int, ...], ...]:
    if depth not in _CONVOLUTIONS:
        raise ValueError(f"VGG has a depth of {', '.join(map(str, _CONVOLUTIONS))}, not {depth}")
    return tuple(
        (round(channels * width),) * count
        for channels, count in zip(_WIDTHS, _CONVOLUTIONS[depth], strict=True)
    )
