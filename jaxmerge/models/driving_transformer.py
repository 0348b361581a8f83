"""A driving network whose convolutions make tokens for a transformer: from a road image to commands.

The stem is that of Xiao et al., "Early convolutions help transformers see better", 2021; the blocks are pre-norm
encoder blocks (Dosovitskiy et al., 2021); the tokens are averaged.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models.layers import Norm, SelfAttention, convolution, dense, norm


@dataclass(frozen=True)
class DrivingTransformerConfig:
    """What a `DrivingTransformer` is.

    Attributes:
      image: height and width of the images.
      stem: widths of the 3 x 3 convolutions, each of which halves the image; the last one is the tokens' width.
      norm: "batch", "group", "layer" or "none", after each convolution.
      groups: of a group norm.
      layers: how many encoder blocks.
      heads: of the attention.
      hidden: width of the blocks' hidden layer.
      outputs: how many commands.
      channels: of the images.
      dtype: of the computation.
    """

    image: tuple[int, int] = (96, 96)
    stem: tuple[int, ...] = (32, 64, 96, 128)
    norm: Norm = "batch"
    groups: int = 8
    layers: int = 4
    heads: int = 4
    hidden: int = 256
    outputs: int = 1
    channels: int = 3
    dtype: str = "float32"

    @property
    def width(self) -> int:
        """Of the tokens."""
        return self.stem[-1]


class DrivingTransformer(nn.Module):
    """Convolutions and a transformer.

    Example:
      >>> config = DrivingTransformerConfig((8, 12), (4, 8), layers=1, heads=2, hidden=16)
      >>> model = DrivingTransformer(config)
      >>> images = jax.ShapeDtypeStruct((2, 8, 12, 3), jnp.float32)
      >>> commands, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
      >>> commands.shape
      (2, 1)
    """

    config: DrivingTransformerConfig

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """images [batch, *image, channels] -> commands [batch, outputs]; `train` is static."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        hidden = images.astype(dtype)
        for i, width in enumerate(config.stem):
            hidden = convolution(
                width, 3, stride=2, bias=True, name=f"conv_{i}", dtype=config.dtype
            )(hidden)
            normalise = norm(
                config.norm,
                name=f"norm_{i}",
                dtype=config.dtype,
                train=train,
                groups=config.groups,
            )
            hidden = nn.relu(normalise(hidden))
        tokens = hidden.reshape(hidden.shape[0], -1, config.width)
        shape = (1, tokens.shape[1], config.width)
        positions = self.param("positions", nn.initializers.truncated_normal(0.02), shape)
        tokens = tokens + positions.astype(dtype)
        for i in range(config.layers):
            tokens = EncoderBlock(config, name=f"block_{i}")(tokens)
        tokens = norm("layer", name="norm", dtype=config.dtype, train=False)(tokens)
        return dense(config.outputs, name="head", dtype=config.dtype)(jnp.mean(tokens, axis=1))


class EncoderBlock(nn.Module):
    """A pre-norm encoder block."""

    config: DrivingTransformerConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [batch, n, width] -> [batch, n, width]."""
        config = self.config
        linear = partial(dense, dtype=config.dtype)
        layer_norm = partial(norm, "layer", dtype=config.dtype, train=False)
        attention = SelfAttention(config.heads, dtype=config.dtype, name="attention")
        tokens = tokens + attention(layer_norm(name="norm1")(tokens))
        hidden = linear(config.hidden, name="fc1")(layer_norm(name="norm2")(tokens))
        return tokens + linear(config.width, name="fc2")(nn.gelu(hidden, approximate=False))
