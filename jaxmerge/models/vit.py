"""Vision transformers, in the variants of timm and of transformers."""

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models.activations import ACTIVATIONS
from jaxmerge.models.inputs import named_inputs
from jaxmerge.models.linear import dense, layer_norm, precision_of
from jaxmerge.models.transformer import PreNormBlock


@dataclass(frozen=True)
class ViTConfig:
    """The structure of a vision transformer.

    Attributes:
      image_size: height and width in pixels.
      patch_size: height and width of a patch.
      channels: of an image.
      hidden_size: features of a patch.
      num_layers: blocks.
      num_heads: attention heads; they share the features evenly.
      intermediate_size: features inside the feed-forward part.
      activation: a key of `ACTIVATIONS`.
      norm_eps: epsilon of the layer norms.
      patch_bias: the map from a patch to features has a bias.
      class_token: a learned token stands before the patches.
      embedding_norm: a layer norm before the first block.
      qkv_bias: the maps to queries, keys and values have biases.
      fused_qkv: they are one map.
      qk_norm: queries and keys are normalised over each head.
      layer_scale: what each part of a block adds is multiplied by a learned vector.
      pooling: what the classifier sees: the "token", or the "average" of the patches, which is then normalised instead
        of the hidden states.
      pooler_size: features of an activated linear map of the first position, which no classifier uses; None for no map.
      pooler_activation: its activation function.
      num_labels: of the classifier; 0 for none.
      dtype: of the computation; the parameters keep their own.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    channels: int = 3
    activation: str = "gelu"
    norm_eps: float = 1e-6
    patch_bias: bool = True
    class_token: bool = True
    embedding_norm: bool = False
    qkv_bias: bool = True
    fused_qkv: bool = False
    qk_norm: bool = False
    layer_scale: bool = False
    pooling: Literal["token", "average"] = "token"
    pooler_size: int | None = None
    pooler_activation: str = "tanh"
    num_labels: int = 0
    dtype: str = "float32"


class ViT(nn.Module):
    """A vision transformer: the logits of its classifier, or the last hidden state where it has none.

    Reference: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021.

    Example:
      >>> config = ViTConfig(
      ...     (8, 8), (4, 4), hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16, num_labels=5
      ... )
      >>> images = jnp.ones((2, 8, 8, 3))
      >>> ViT(config).apply(ViT(config).init(jax.random.key(0), images), images).shape
      (2, 5)
    """

    config: ViTConfig

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.patch_embedding = nn.Conv(
            config.hidden_size,
            config.patch_size,
            strides=config.patch_size,
            padding="VALID",
            use_bias=config.patch_bias,
            dtype=dtype,
            precision=precision_of(dtype),
        )
        if config.class_token:
            self.class_token = self.param(
                "class_token", nn.initializers.zeros, (config.hidden_size,)
            )
        height, width = (
            side // patch for side, patch in zip(config.image_size, config.patch_size, strict=True)
        )
        self.position_embedding = self.param(
            "position_embedding",
            nn.initializers.normal(0.02),
            (height * width + config.class_token, config.hidden_size),
        )
        if config.embedding_norm:
            self.embedding_norm = layer_norm(config.norm_eps, dtype)
        self.layers = [
            PreNormBlock(
                num_heads=config.num_heads,
                hidden_size=config.intermediate_size,
                activation=config.activation,
                norm_eps=config.norm_eps,
                qkv_bias=config.qkv_bias,
                fused_qkv=config.fused_qkv,
                qk_norm=config.qk_norm,
                layer_scale=config.layer_scale,
                dtype=dtype,
            )
            for _ in range(config.num_layers)
        ]
        self.norm = layer_norm(config.norm_eps, dtype)
        if config.pooler_size is not None:
            self.pooler = dense(config.pooler_size, dtype)
        if config.num_labels:
            self.classifier = dense(config.num_labels, dtype)

    def __call__(self, inputs: Any) -> jax.Array:
        """Runs the encoder and its classifier.

        Args:
          inputs: images [batch, height, width, channels], or a dict with them as "pixel_values".

        Returns:
          Logits [batch, labels]; without a classifier the last hidden state [batch, length, features], the class token
          first.
        """
        hidden = self.encode(inputs)
        if self.config.pooler_size is not None:
            # Nothing here needs it, but `init` makes its parameters; compiled, it is left out.
            ACTIVATIONS[self.config.pooler_activation](self.pooler(hidden[:, 0]))
        if self.config.pooling == "token":
            seen = hidden[:, 0]
        else:
            seen = self.norm(hidden[:, int(self.config.class_token) :].mean(axis=1))
        return self.classifier(seen) if self.config.num_labels else hidden

    def encode(self, inputs: Any) -> jax.Array:
        """The last hidden state [batch, length, features], with or without a classifier; inputs as for `__call__`."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        images = named_inputs(inputs, ["pixel_values"])["pixel_values"]
        expected = (*config.image_size, config.channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images: expected [batch, height, width, channels] = [batch, "
                f"{', '.join(map(str, expected))}], found {list(images.shape)}"
            )
        x = self.patch_embedding(images)
        x = x.reshape(x.shape[0], -1, config.hidden_size)
        if config.class_token:
            token = self.class_token.astype(dtype)[None, None]
            x = jnp.concatenate(
                [jnp.broadcast_to(token, (x.shape[0], 1, token.shape[-1])), x], axis=1
            )
        x = x + self.position_embedding[None].astype(dtype)
        if config.embedding_norm:
            x = self.embedding_norm(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) if config.pooling == "token" else x
