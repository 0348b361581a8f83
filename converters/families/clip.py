"""CLIP in the layout of transformers: both towers, or one of them with or without its projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families.family import Family
from jaxmerge.converters.families.hugging_face import (
    activation_of,
    activation_to,
    heads_of,
    require_config,
)
from jaxmerge.converters.families.layers import dense, embedding, norm
from jaxmerge.converters.families.rules import Rule, as_is
from jaxmerge.converters.families.vit import pair, patch_rules
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.clip import CLIP, CLIPConfig, CLIPTextConfig
from jaxmerge.models.vit import ViTConfig

# What transformers takes where a tower's part of config.json leaves a field out.
_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_PROJECTION = 512
# With this token id (a slip in old configs) the end of a text is its highest token id.
_OLD_END = 2


def _rules(config: CLIPConfig) -> list[Rule]:
    rules: list[Rule] = []
    alone = config.projection_size is None
    if config.text is not None:
        rules += _text_rules("" if alone else "text_model.", config.text)
        if not alone:
            rules += dense("text_projection", "params/text_projection", bias=False)
    if config.vision is not None:
        rules += _vision_rules("" if alone else "vision_model.", config.vision)
        if not alone:
            rules += dense("visual_projection", "params/image_projection", bias=False)
    if config.text is not None and config.vision is not None:
        rules.append(Rule("logit_scale", "params/logit_scale", as_is()))
    return rules


def _text_rules(base: str, config: CLIPTextConfig) -> list[Rule]:
    path = "params/text"
    return [
        embedding(f"{base}embeddings.token_embedding", f"{path}/token_embedding"),
        Rule(f"{base}embeddings.position_embedding.weight", f"{path}/position_embedding"),
        *(
            _block_rules(f"{base}encoder.layers.{{i}}", f"{path}/layers_{{i}}")
            if config.num_layers
            else ()
        ),
        *norm(f"{base}final_layer_norm", f"{path}/norm"),
    ]


def _vision_rules(base: str, config: ViTConfig) -> list[Rule]:
    path = "params/vision"
    return [
        Rule(f"{base}embeddings.class_embedding", f"{path}/class_token"),
        Rule(f"{base}embeddings.position_embedding.weight", f"{path}/position_embedding"),
        *patch_rules(f"{base}embeddings.patch_embedding", f"{path}/patch_embedding", bias=False),
        # Spelt so in every checkpoint.
        *norm(f"{base}pre_layrnorm", f"{path}/embedding_norm"),
        *(
            _block_rules(f"{base}encoder.layers.{{i}}", f"{path}/layers_{{i}}")
            if config.num_layers
            else ()
        ),
        *norm(f"{base}post_layernorm", f"{path}/norm"),
    ]


def _block_rules(layer: str, path: str) -> list[Rule]:
    rules = norm(f"{layer}.layer_norm1", f"{path}/attention_norm")
    for name, part in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "output")):
        rules += dense(f"{layer}.self_attn.{name}_proj", f"{path}/attention/{part}")
    rules += norm(f"{layer}.layer_norm2", f"{path}/feed_forward_norm")
    rules += dense(f"{layer}.mlp.fc1", f"{path}/feed_forward/up")
    return [*rules, *dense(f"{layer}.mlp.fc2", f"{path}/feed_forward/down")]


def _config_of(json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> CLIPConfig:
    require_config(json)
    kind = json.get("model_type", "clip")
    if kind == "clip":
        return CLIPConfig(
            _text({**json.get("text_config", {}), **(json.get("text_config_dict") or {})}),
            _vision({**json.get("vision_config", {}), **(json.get("vision_config_dict") or {})}),
            json.get("projection_dim", _PROJECTION),
        )
    projected = any(
        name in tensors for name in ("text_projection.weight", "visual_projection.weight")
    )
    size = json.get("projection_dim", _PROJECTION) if projected else None
    if kind == "clip_text_model":
        return CLIPConfig(_text(json), None, size)
    return CLIPConfig(None, _vision(json), size)


def _text(json: Mapping[str, Any]) -> CLIPTextConfig:
    json = {**_TEXT, **json}
    end = json["eos_token_id"]
    if not isinstance(end, int):
        raise CheckpointError(
            f"config.json: eos_token_id: expected the token that ends a text, found {end!r}"
        )
    return CLIPTextConfig(
        vocab_size=json["vocab_size"],
        hidden_size=json["hidden_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=heads_of(json, "num_attention_heads", "hidden_size"),
        intermediate_size=json["intermediate_size"],
        max_positions=json["max_position_embeddings"],
        activation=activation_of(json["hidden_act"]),
        norm_eps=json["layer_norm_eps"],
        end_id=None if end == _OLD_END else end,
    )


def _vision(json: Mapping[str, Any]) -> ViTConfig:
    json = {**_VISION, **json}
    return ViTConfig(
        image_size=pair(json["image_size"], "image_size"),
        patch_size=pair(json["patch_size"], "patch_size"),
        hidden_size=json["hidden_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=heads_of(json, "num_attention_heads", "hidden_size"),
        intermediate_size=json["intermediate_size"],
        channels=json["num_channels"],
        activation=activation_of(json["hidden_act"]),
        norm_eps=json["layer_norm_eps"],
        patch_bias=False,
        embedding_norm=True,
    )


def _config_to(config: CLIPConfig) -> dict[str, Any]:
    text = None if config.text is None else _text_json(config.text)
    vision = None if config.vision is None else _vision_json(config.vision)
    size = {} if config.projection_size is None else {"projection_dim": config.projection_size}
    with_projection = "WithProjection" if size else ""
    if text is None:
        return {"architectures": [f"CLIPVisionModel{with_projection}"], **(vision or {}), **size}
    if vision is None:
        return {"architectures": [f"CLIPTextModel{with_projection}"], **text, **size}
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "text_config": text,
        "vision_config": vision,
        **size,
    }


def _text_json(config: CLIPTextConfig) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "hidden_act": activation_to(config.activation),
        "layer_norm_eps": config.norm_eps,
        "eos_token_id": _OLD_END if config.end_id is None else config.end_id,
    }


def _vision_json(config: ViTConfig) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "image_size": config.image_size[0],
        "patch_size": config.patch_size[0],
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "num_channels": config.channels,
        "hidden_act": activation_to(config.activation),
        "layer_norm_eps": config.norm_eps,
    }


def _inputs(config: CLIPConfig) -> dict[str, jax.ShapeDtypeStruct]:
    inputs = {}
    if config.text is not None:
        inputs["input_ids"] = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if config.vision is not None:
        shape = (1, *config.vision.image_size, config.vision.channels)
        inputs["pixel_values"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return inputs


CLIP_TOWERS = Family(
    name="clip",
    config_type=CLIPConfig,
    module=CLIP,
    inputs=_inputs,
    rules=_rules,
    config_of=_config_of,
    config_to=_config_to,
    model_types=("clip_text_model", "clip_vision_model"),
    prefixes=("text_model.", "vision_model."),
    ignored=tuple(
        f"{base}embeddings.position_ids" for base in ("", "text_model.", "vision_model.")
    ),
)
