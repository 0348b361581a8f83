"""CLIP: a text tower and an image tower whose features meet in one space."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models.attention import causal_mask, padding_mask
from jaxmerge.models.inputs import named_inputs
from jaxmerge.models.linear import dense, layer_norm, precision_of
from jaxmerge.models.transformer import PreNormBlock
from jaxmerge.models.vit import ViT, ViTConfig


@dataclass(frozen=True)
class CLIPTextConfig:
    """The structure of a text tower.

    Attributes:
      vocab_size: token ids.
      hidden_size: features of a position.
      num_layers: blocks.
      num_heads: attention heads; they share the features evenly.
      intermediate_size: features inside the feed-forward part.
      max_positions: the longest text.
      activation: a key of `ACTIVATIONS`.
      norm_eps: epsilon of the layer norms.
      end_id: the token whose first position stands for the text; None for the highest token id of each text.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 77
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    end_id: int | None = None


@dataclass(frozen=True)
class CLIPConfig:
    """The structure of a CLIP, or of one of its towers.

    Attributes:
      text: the text tower; None for an image tower alone.
      vision: the image tower, whose `dtype` does not count; None for a text tower alone.
      projection_size: features of the common space; None for a tower without its projection.
      dtype: of the computation; the parameters keep their own.
    """

    text: CLIPTextConfig | None
    vision: ViTConfig | None
    projection_size: int | None
    dtype: str = "float32"


class CLIP(nn.Module):
    """Logits of images against texts: exp(logit_scale) * cos(image features, text features).

    Of one tower alone: its features.

    Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021.

    Example:
      >>> text = CLIPTextConfig(30, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16)
      >>> vision = ViTConfig((8, 8), (4, 4), 8, num_layers=1, num_heads=2, intermediate_size=16)
      >>> model = CLIP(CLIPConfig(text, vision, projection_size=6))
      >>> inputs = {"input_ids": jnp.array([[1, 4, 29]] * 3), "pixel_values": jnp.ones((2, 8, 8, 3))}
      >>> params = model.init(jax.random.key(0), inputs)
      >>> model.apply(params, inputs).shape
      (2, 3)
      >>> image_features(model.config)(params, inputs["pixel_values"]).shape
      (2, 6)
    """

    config: CLIPConfig

    def setup(self) -> None:
        config = self.config
        if config.text is not None:
            self.text = TextTower(config.text, jnp.dtype(config.dtype))
            if config.projection_size is not None:
                self.text_projection = self._projection(config.projection_size)
        if config.vision is not None:
            self.vision = ViT(replace(config.vision, dtype=config.dtype))
            if config.projection_size is not None:
                self.image_projection = self._projection(config.projection_size)
        if config.text is not None and config.vision is not None:
            self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def __call__(self, inputs: Any) -> jax.Array:
        """Compares images with texts.

        Args:
          inputs: a dict of "input_ids" [texts, length], perhaps "attention_mask" [texts, length] (0 at padding), and
            "pixel_values" [images, height, width, channels]; for one tower what it needs, and a bare array may do.

        Returns:
          Logits [images, texts]; of one tower its features [texts or images, features].
        """
        config = self.config
        if config.vision is None:
            return self.text_features(inputs)
        if config.text is None:
            return self.image_features(inputs)
        given = named_inputs(inputs, ["input_ids", "pixel_values"], ["attention_mask"])
        images = _unit(self.image_features(given.pop("pixel_values")))
        texts = _unit(self.text_features(given))
        cosines = jnp.matmul(images, texts.T, precision=precision_of(images.dtype))
        return jnp.exp(self.logit_scale).astype(images.dtype) * cosines

    def text_features(self, inputs: Any) -> jax.Array:
        """token ids [texts, length], or a dict with "input_ids" and "attention_mask" -> [texts, features]."""
        given = named_inputs(inputs, ["input_ids"], ["attention_mask"])
        pooled = self.text(given["input_ids"], given.get("attention_mask"))
        return pooled if self.config.projection_size is None else self.text_projection(pooled)

    def image_features(self, inputs: Any) -> jax.Array:
        """images [images, height, width, channels] -> [images, features]."""
        pooled = self.vision.encode(inputs)[:, 0]
        return pooled if self.config.projection_size is None else self.image_projection(pooled)

    def _projection(self, size: int) -> nn.Dense:
        return dense(size, self.config.dtype, bias=False)


class TextTower(nn.Module):
    """A causal transformer; the normalised state of a text's last token stands for the text."""

    config: CLIPTextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        """ids [texts, length], attention_mask [texts, length] -> [texts, features]."""
        config, length = self.config, ids.shape[1]
        if length > config.max_positions:
            raise ValueError(
                f"{length} tokens, but the model has positions for {config.max_positions}"
            )
        table, size = nn.initializers.normal(0.02), config.hidden_size
        positions = self.param("position_embedding", table, (config.max_positions, size))
        x = nn.Embed(config.vocab_size, size, dtype=self.dtype, name="token_embedding")(ids)
        x = x + positions[None, :length].astype(self.dtype)
        mask = causal_mask(length)
        if attention_mask is not None:
            mask = mask & padding_mask(attention_mask)
        for i in range(config.num_layers):
            x = PreNormBlock(
                num_heads=config.num_heads,
                hidden_size=config.intermediate_size,
                activation=config.activation,
                norm_eps=config.norm_eps,
                dtype=self.dtype,
                name=f"layers_{i}",
            )(x, mask)
        x = layer_norm(config.norm_eps, self.dtype, "norm")(x)
        last = ids if config.end_id is None else (ids == config.end_id).astype(jnp.int32)
        return jnp.take_along_axis(x, jnp.argmax(last, axis=1)[:, None, None], axis=1)[:, 0]


@cache
def text_features(config: CLIPConfig) -> Callable[[Any, Any], jax.Array]:
    """The text tower's function of (params, inputs), see `CLIP.text_features`; the same object for equal configs."""
    return _method(config, "text_features")


@cache
def image_features(config: CLIPConfig) -> Callable[[Any, Any], jax.Array]:
    """The image tower's function of (params, images), see `CLIP.image_features`; the same object for equal configs."""
    return _method(config, "image_features")


def _method(config: CLIPConfig, name: str) -> Callable[[Any, Any], jax.Array]:
    def features(params: Any, inputs: Any) -> jax.Array:
        return cast(jax.Array, CLIP(config).apply(params, inputs, method=name))

    return features


def _unit(features: jax.Array) -> jax.Array:
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
