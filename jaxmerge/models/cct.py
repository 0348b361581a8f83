"""Compact convolutional transformer: convolutional tokens, pre-norm encoder blocks, and pooling over the sequence.

Reference: Hassani et al., "Escaping the big data paradigm with compact transformers", 2021.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models.layers import SelfAttention, convolution, dense, max_pool, norm


@dataclass(frozen=True)
class CCTConfig:
    """What a `CCT` is; the defaults are CCT-7/3x1 for 32 x 32 images.

    Attributes:
      image: height and width of the images.
      tokenizer: widths of the convolutions; the last one is the width of the tokens. After each the image is halved by
        a pooling.
      kernel: side of the convolutions.
      stride: of the convolutions.
      layers: how many encoder blocks.
      heads: of the attention.
      hidden: width of the blocks' hidden layer.
      classes: how many logits.
      positions: whether tokens get an embedding of their position.
      channels: of the images.
      dtype: of the computation.
    """

    image: tuple[int, int] = (32, 32)
    tokenizer: tuple[int, ...] = (256,)
    kernel: int = 3
    stride: int = 1
    layers: int = 7
    heads: int = 4
    hidden: int = 512
    classes: int = 10
    positions: bool = True
    channels: int = 3
    dtype: str = "float32"

    @property
    def width(self) -> int:
        """Of the tokens."""
        return self.tokenizer[-1]


class CCT(nn.Module):
    """A compact convolutional transformer.

    Example:
      >>> model = CCT(CCTConfig((8, 8), (16,), layers=1, heads=2, hidden=32))
      >>> images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
      >>> logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
      >>> logits.shape
      (2, 10)
    """

    config: CCTConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images [batch, *image, channels] -> logits [batch, classes]."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        hidden = images.astype(dtype)
        for i, width in enumerate(config.tokenizer):
            hidden = convolution(
                width, config.kernel, stride=config.stride, name=f"conv_{i}", dtype=config.dtype
            )(hidden)
            hidden = max_pool(nn.relu(hidden), 3, 2, 1)
        tokens = hidden.reshape(hidden.shape[0], -1, config.width)
        if config.positions:
            shape = (1, tokens.shape[1], config.width)
            table = self.param("positions", nn.initializers.truncated_normal(0.2), shape)
            tokens = tokens + table.astype(dtype)
        for i in range(config.layers):
            tokens = CCTBlock(config, name=f"block_{i}")(tokens)
        tokens = norm("layer", name="norm", dtype=config.dtype, train=False)(tokens)
        weights = nn.softmax(dense(1, name="pool", dtype=config.dtype)(tokens), axis=1)
        pooled = jnp.sum(weights * tokens, axis=1)
        return dense(config.classes, name="head", dtype=config.dtype)(pooled)


class CCTBlock(nn.Module):
    """Attention and an MLP; the MLP's residual starts after its norm, as the authors' code has it."""

    config: CCTConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [batch, n, width] -> [batch, n, width]."""
        config = self.config
        linear = partial(dense, dtype=config.dtype)
        layer_norm = partial(norm, "layer", dtype=config.dtype, train=False)
        attention = SelfAttention(config.heads, bias=False, dtype=config.dtype, name="attention")
        tokens = tokens + attention(layer_norm(name="pre_norm")(tokens))
        tokens = layer_norm(name="norm")(tokens)
        hidden = nn.gelu(linear(config.hidden, name="fc1")(tokens), approximate=False)
        return tokens + linear(config.width, name="fc2")(hidden)
