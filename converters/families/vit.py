"""Vision transformers in the layouts of transformers and of timm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families.family import Family, from_plain_json
from jaxmerge.converters.families.hugging_face import (
    activation_of,
    activation_to,
    heads_of,
    require_config,
)
from jaxmerge.converters.families.layers import dense, norm, reshaped
from jaxmerge.converters.families.rules import Rule, as_is, convolution
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.vit import ViT, ViTConfig

# Heads of timm's own models by their width: a checkpoint's tensors do not tell them.
_TIMM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}


def pair(value: Any, key: str) -> tuple[int, int]:
    """The height and width that a number or a pair of numbers in config.json stands for.

    Example:
      >>> pair(224, "image_size"), pair([32, 64], "image_size")
      ((224, 224), (32, 64))
    """
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise CheckpointError(
            f"config.json: {key}: expected a size or [height, width], found {value!r}"
        )
    return sides


def patch_rules(name: str, path: str, *, bias: bool) -> list[Rule]:
    """The rules of the map from patches to features."""
    rules = [Rule(f"{name}.weight", f"{path}/kernel", convolution())]
    return [*rules, Rule(f"{name}.bias", f"{path}/bias", as_is())] if bias else rules


def num_positions(config: ViTConfig) -> int:
    """The rows of the table of positions."""
    (height, width), (rows, columns) = config.image_size, config.patch_size
    return (height // rows) * (width // columns) + config.class_token


def _hugging_face_rules(config: ViTConfig) -> list[Rule]:
    base, size = "vit." if config.num_labels else "", config.hidden_size
    rules = [
        Rule(f"{base}embeddings.cls_token", "params/class_token", reshaped(1, 1, size)),
        Rule(
            f"{base}embeddings.position_embeddings",
            "params/position_embedding",
            reshaped(1, num_positions(config), size),
        ),
        *patch_rules(
            f"{base}embeddings.patch_embeddings.projection", "params/patch_embedding", bias=True
        ),
    ]
    layer, path = f"{base}encoder.layer.{{i}}", "params/layers_{i}"
    if config.num_layers:
        rules += norm(f"{layer}.layernorm_before", f"{path}/attention_norm")
        for part in ("query", "key", "value"):
            name = f"{layer}.attention.attention.{part}"
            rules += dense(name, f"{path}/attention/{part}", bias=config.qkv_bias)
        rules += dense(f"{layer}.attention.output.dense", f"{path}/attention/output")
        rules += norm(f"{layer}.layernorm_after", f"{path}/feed_forward_norm")
        rules += dense(f"{layer}.intermediate.dense", f"{path}/feed_forward/up")
        rules += dense(f"{layer}.output.dense", f"{path}/feed_forward/down")
    rules += norm(f"{base}layernorm", "params/norm")
    if config.pooler_size is not None:
        rules += dense(f"{base}pooler.dense", "params/pooler")
    if config.num_labels:
        rules += dense("classifier", "params/classifier")
    return rules


def _hugging_face_config(json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> ViTConfig:
    require_config(json)
    pooler = next((tensors[name] for name in _POOLERS if name in tensors), None)
    classifier = tensors.get("classifier.weight")
    return ViTConfig(
        image_size=pair(json["image_size"], "image_size"),
        patch_size=pair(json["patch_size"], "patch_size"),
        hidden_size=json["hidden_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=heads_of(json, "num_attention_heads", "hidden_size"),
        intermediate_size=json["intermediate_size"],
        channels=json.get("num_channels", 3),
        activation=activation_of(json["hidden_act"]),
        norm_eps=json.get("layer_norm_eps", 1e-12),
        qkv_bias=json.get("qkv_bias", True),
        pooler_size=None if pooler is None else pooler.shape[0],
        pooler_activation=activation_of(json.get("pooler_act", "tanh"), "pooler_act"),
        num_labels=0 if classifier is None else classifier.shape[0],
    )


_POOLERS = ("pooler.dense.weight", "vit.pooler.dense.weight")


def _hugging_face_json(config: ViTConfig) -> dict[str, Any]:
    labels = {"num_labels": config.num_labels} if config.num_labels else {}
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if config.num_labels else "ViTModel"],
        "image_size": _side(config.image_size),
        "patch_size": _side(config.patch_size),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "num_channels": config.channels,
        "hidden_act": activation_to(config.activation),
        "layer_norm_eps": config.norm_eps,
        "qkv_bias": config.qkv_bias,
        "pooler_output_size": config.pooler_size or config.hidden_size,
        "pooler_act": activation_to(config.pooler_activation),
        **labels,
    }


def _side(sides: tuple[int, int]) -> int | list[int]:
    return sides[0] if sides[0] == sides[1] else list(sides)


def _timm_rules(config: ViTConfig) -> list[Rule]:
    size = config.hidden_size
    rules = [
        Rule("pos_embed", "params/position_embedding", reshaped(1, num_positions(config), size)),
        *patch_rules("patch_embed.proj", "params/patch_embedding", bias=config.patch_bias),
    ]
    if config.class_token:
        rules.append(Rule("cls_token", "params/class_token", reshaped(1, 1, size)))
    if config.embedding_norm:
        rules += norm("norm_pre", "params/embedding_norm")
    layer, path = "blocks.{i}", "params/layers_{i}"
    if config.num_layers:
        rules += norm(f"{layer}.norm1", f"{path}/attention_norm")
        rules += dense(f"{layer}.attn.qkv", f"{path}/attention/qkv", bias=config.qkv_bias)
        if config.qk_norm:
            rules += norm(f"{layer}.attn.q_norm", f"{path}/attention/query_norm")
            rules += norm(f"{layer}.attn.k_norm", f"{path}/attention/key_norm")
        rules += dense(f"{layer}.attn.proj", f"{path}/attention/output")
        rules += norm(f"{layer}.norm2", f"{path}/feed_forward_norm")
        rules += dense(f"{layer}.mlp.fc1", f"{path}/feed_forward/up")
        rules += dense(f"{layer}.mlp.fc2", f"{path}/feed_forward/down")
        if config.layer_scale:
            rules.append(Rule(f"{layer}.ls1.gamma", f"{path}/attention_scale", as_is()))
            rules.append(Rule(f"{layer}.ls2.gamma", f"{path}/feed_forward_scale", as_is()))
    rules += norm("norm" if config.pooling == "token" else "fc_norm", "params/norm")
    if config.num_labels:
        rules += dense("head", "params/classifier")
    return rules


def _timm_config(json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> ViTConfig:
    if json.get("model_type") == "vit_timm":
        return from_plain_json(ViTConfig, json)
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in tensors:
            raise CheckpointError(f"no tensor {name!r}")
    size, channels, *patch = tensors["patch_embed.proj.weight"].shape
    given = {**json, **json.get("model_args", {})}
    class_token = "cls_token" in tensors
    head = tensors.get("head.weight")
    layers = 0
    while f"blocks.{layers}.norm1.weight" in tensors:
        layers += 1
    return ViTConfig(
        image_size=_timm_image(given, tensors["pos_embed"].shape[1] - class_token, patch),
        patch_size=pair(patch, "patch_size"),
        hidden_size=size,
        num_layers=layers,
        num_heads=_timm_heads(given, tensors, size),
        intermediate_size=tensors["blocks.0.mlp.fc1.weight"].shape[0],
        channels=channels,
        patch_bias="patch_embed.proj.bias" in tensors,
        class_token=class_token,
        embedding_norm="norm_pre.weight" in tensors,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        fused_qkv=True,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        layer_scale="blocks.0.ls1.gamma" in tensors,
        pooling="average" if "fc_norm.weight" in tensors else "token",
        num_labels=0 if head is None else head.shape[0],
    )


def _timm_heads(json: Mapping[str, Any], tensors: Mapping[str, TensorInfo], size: int) -> int:
    if "num_heads" in json:
        return heads_of({**json, "embed_dim": size}, "num_heads", "embed_dim")
    head_size = tensors.get("blocks.0.attn.q_norm.weight")
    if head_size is not None:
        return size // head_size.shape[0]
    if size not in _TIMM_HEADS:
        raise CheckpointError(
            f"the tensors do not tell how many attention heads a width of {size} has: give "
            "config={'num_heads': ...}"
        )
    return _TIMM_HEADS[size]


def _timm_image(json: Mapping[str, Any], patches: int, patch: list[int]) -> tuple[int, int]:
    if "img_size" in json:
        return pair(json["img_size"], "img_size")
    side = math.isqrt(patches)
    if side * side != patches:
        raise CheckpointError(
            f"{patches} patches are no square: give config={{'img_size': [height, width]}}"
        )
    return side * patch[0], side * patch[1]


def _inputs(config: ViTConfig) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *config.image_size, config.channels), jnp.float32)


VIT = Family(
    name="vit",
    config_type=ViTConfig,
    module=ViT,
    inputs=_inputs,
    rules=_hugging_face_rules,
    config_of=_hugging_face_config,
    config_to=_hugging_face_json,
    prefixes=("vit.",),
)

VIT_TIMM = Family(
    name="vit_timm",
    config_type=ViTConfig,
    module=ViT,
    inputs=_inputs,
    rules=_timm_rules,
    config_of=_timm_config,
    prefixes=("model.",),
)
