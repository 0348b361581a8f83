"""Driving networks: PilotNet (`conv{i}`, `fc{i}`) and the transformer (`stem.{i}`, `blocks.{i}`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families import layers
from jaxmerge.converters.families.family import Family, batch_counters, from_plain_json
from jaxmerge.converters.families.rules import Rule, as_is
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.driving_transformer import DrivingTransformer, DrivingTransformerConfig
from jaxmerge.models.pilotnet import PilotNet, PilotNetConfig


def _pilotnet_rules(config: PilotNetConfig) -> list[Rule]:
    rules = []
    for i in range(len(config.convolutions)):
        rules += layers.conv(f"conv{i + 1}", f"params/conv_{i}", bias=True)
    widths = (*config.hidden, config.outputs)
    features = (*config.feature_map, config.convolutions[-1][0])
    rules += layers.flattened_dense("fc1", "params/dense_0", features, widths[0])
    for i in range(1, len(widths)):
        rules += layers.dense(f"fc{i + 1}", f"params/dense_{i}")
    return rules


def _pilotnet_config(json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> PilotNetConfig:
    kernels = layers.shapes_of(tensors, lambda i: f"conv{i + 1}.weight", 4)
    widths = layers.shapes_of(tensors, lambda i: f"fc{i + 1}.weight", 2)
    config = from_plain_json(
        PilotNetConfig,
        {
            # As in the paper: strides of 2 where the kernel is 5 x 5.
            "convolutions": [[width, side, 2 if side == 5 else 1] for width, _, side, _ in kernels],
            "hidden": [shape[0] for shape in widths[:-1]],
            "outputs": widths[-1][0],
            "channels": kernels[0][1],
            **json,
        },
    )
    height, width = config.feature_map
    if height * width * config.convolutions[-1][0] != widths[0][1]:
        raise CheckpointError(
            f"images of {config.image[0]} x {config.image[1]} give {height} x {width} x "
            f"{config.convolutions[-1][0]} features, 'fc1.weight' takes {widths[0][1]}; say the "
            'size of the images: config={"image": [66, 200]}'
        )
    return config


def _transformer_rules(config: DrivingTransformerConfig) -> list[Rule]:
    rules = [Rule("positions", "params/positions", as_is())]
    for i in range(len(config.stem)):
        rules += layers.conv(f"stem.{i}.conv", f"params/conv_{i}", bias=True)
        rules += layers.norm_of_kind(f"stem.{i}.norm", f"params/norm_{i}", config.norm)
    for i in range(config.layers):
        name, path = f"blocks.{i}", f"block_{i}"
        rules += layers.norm(f"{name}.norm1", f"params/{path}/norm1")
        rules += layers.attention(
            f"{name}.attention.qkv",
            f"{name}.attention.proj",
            f"params/{path}/attention",
            width=config.width,
        )
        rules += layers.norm(f"{name}.norm2", f"params/{path}/norm2")
        rules += layers.dense(f"{name}.mlp.fc1", f"params/{path}/fc1")
        rules += layers.dense(f"{name}.mlp.fc2", f"params/{path}/fc2")
    return [*rules, *layers.norm("norm", "params/norm"), *layers.dense("head", "params/head")]


def _transformer_config(
    json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> DrivingTransformerConfig:
    stem = layers.shapes_of(tensors, lambda i: f"stem.{i}.conv.weight", 4)
    blocks = layers.shapes_of(tensors, lambda i: f"blocks.{i}.mlp.fc1.weight", 2)
    for field, example in (("image", "[96, 96]"), ("heads", "4")):
        if field not in json:
            raise CheckpointError(
                f"{field!r} is not in the tensors; say it: config={{{field!r}: {example}, ...}}"
            )
    derived = {
        "stem": [shape[0] for shape in stem],
        "norm": layers.norm_kind(tensors, "stem.0.norm", json),
        "layers": len(blocks),
        "hidden": blocks[0][0],
        "outputs": layers.shape_of(tensors, "head.weight", 2)[0],
        "channels": stem[0][1],
    }
    return from_plain_json(DrivingTransformerConfig, {**derived, **json})


def _pilotnet_inputs(config: PilotNetConfig) -> jax.ShapeDtypeStruct:
    return layers.images(*config.image, config.channels)


def _transformer_inputs(config: DrivingTransformerConfig) -> jax.ShapeDtypeStruct:
    return layers.images(*config.image, config.channels)


PILOTNET = Family(
    name="pilotnet",
    config_type=PilotNetConfig,
    module=PilotNet,
    inputs=_pilotnet_inputs,
    rules=_pilotnet_rules,
    config_of=_pilotnet_config,
)
DRIVING_TRANSFORMER = Family(
    name="driving_transformer",
    config_type=DrivingTransformerConfig,
    module=DrivingTransformer,
    inputs=_transformer_inputs,
    rules=_transformer_rules,
    config_of=_transformer_config,
    buffers=batch_counters,
)
