"""Compact convolutional transformers, with the names of the authors' code."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import jax

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families import layers
from jaxmerge.converters.families.family import Family, from_plain_json
from jaxmerge.converters.families.rules import Rule, as_is
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.cct import CCT, CCTConfig

# Of all configurations of the paper.
_HEAD = 64


def _rules(config: CCTConfig) -> list[Rule]:
    rules = []
    for i in range(len(config.tokenizer)):
        rules += layers.conv(f"tokenizer.conv_layers.{i}.0", f"params/conv_{i}")
    if config.positions:
        rules.append(Rule("classifier.positional_emb", "params/positions", as_is()))
    for i in range(config.layers):
        name, path = f"classifier.blocks.{i}", f"block_{i}"
        rules += layers.norm(f"{name}.pre_norm", f"params/{path}/pre_norm")
        rules += layers.attention(
            f"{name}.self_attn.qkv",
            f"{name}.self_attn.proj",
            f"params/{path}/attention",
            width=config.width,
            bias=False,
        )
        rules += layers.norm(f"{name}.norm1", f"params/{path}/norm")
        rules += layers.dense(f"{name}.linear1", f"params/{path}/fc1")
        rules += layers.dense(f"{name}.linear2", f"params/{path}/fc2")
    return [
        *rules,
        *layers.norm("classifier.norm", "params/norm"),
        *layers.dense("classifier.attention_pool", "params/pool"),
        *layers.dense("classifier.fc", "params/head"),
    ]


def _config_of(json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> CCTConfig:
    convolutions = layers.shapes_of(tensors, lambda i: f"tokenizer.conv_layers.{i}.0.weight", 4)
    blocks = layers.shapes_of(tensors, lambda i: f"classifier.blocks.{i}.linear1.weight", 2)
    tokenizer = [shape[0] for shape in convolutions]
    _, channels, kernel, _ = convolutions[0]
    stride = int(json.get("stride", 1 if kernel == 3 else 2))
    derived: dict[str, Any] = {
        "tokenizer": tokenizer,
        "kernel": kernel,
        "stride": stride,
        "layers": len(blocks),
        "hidden": blocks[0][0],
        "classes": layers.shape_of(tensors, "classifier.fc.weight", 2)[0],
        "positions": "classifier.positional_emb" in tensors,
        "channels": channels,
    }
    if "heads" not in json:
        if tokenizer[-1] % _HEAD:
            raise CheckpointError(
                f"a width of {tokenizer[-1]} is no multiple of {_HEAD}: the heads are not in the "
                'tensors; say how many: config={"heads": 4}'
            )
        derived["heads"] = tokenizer[-1] // _HEAD
    if "image" not in json and derived["positions"]:
        tokens = layers.shape_of(tensors, "classifier.positional_emb", 3)[1]
        side = isqrt(tokens) * (2 * stride) ** len(tokenizer)
        derived["image"] = [side, side]
    return from_plain_json(CCTConfig, {**derived, **json})


def _inputs(config: CCTConfig) -> jax.ShapeDtypeStruct:
    return layers.images(*config.image, config.channels)


CCT_FAMILY = Family(
    name="cct",
    config_type=CCTConfig,
    module=CCT,
    inputs=_inputs,
    rules=_rules,
    config_of=_config_of,
)
