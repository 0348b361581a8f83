"""ResNets: torchvision's names (`downsample`, `fc`) and those of common CIFAR code (`shortcut`, `linear`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from jaxmerge.converters.families import layers
from jaxmerge.converters.families.family import Family, batch_counters, from_plain_json
from jaxmerge.converters.families.rules import Rule
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.resnet import EXPANSION, Block, ResNet, ResNetConfig


def _rules(shortcut: str, head: str, config: ResNetConfig) -> list[Rule]:
    rules = [
        *layers.conv("conv1", "params/conv1"),
        *layers.norm_of_kind("bn1", "params/norm1", config.norm),
    ]
    for stage, count in enumerate(config.blocks):
        for i in range(count):
            name, path = f"layer{stage + 1}.{i}", f"stage{stage + 1}_{i}"
            for n in range(1, 4 if config.block == "bottleneck" else 3):
                rules += layers.conv(f"{name}.conv{n}", f"params/{path}/conv{n}")
                rules += layers.norm_of_kind(f"{name}.bn{n}", f"params/{path}/norm{n}", config.norm)
            if config.shortcut == "projection" and config.changes_shape(stage, i):
                rules += layers.conv(f"{name}.{shortcut}.0", f"params/{path}/shortcut_conv")
                rules += layers.norm_of_kind(
                    f"{name}.{shortcut}.1", f"params/{path}/shortcut_norm", config.norm
                )
    return [*rules, *layers.dense(head, "params/head")]


def _config_of(
    shortcut: str, head: str, json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> ResNetConfig:
    _, channels, side, _ = layers.shape_of(tensors, "conv1.weight", 4)
    first = layers.shapes_of(tensors, lambda i: f"layer{i + 1}.0.conv1.weight", 4)
    widths = [shape[0] for shape in first]
    blocks = [_count(tensors, f"layer{stage + 1}") for stage in range(len(first))]
    block: Block = "bottleneck" if "layer1.0.conv3.weight" in tensors else "basic"
    derived = {
        "blocks": blocks,
        "widths": widths,
        "classes": layers.shape_of(tensors, f"{head}.weight", 2)[0],
        "block": block,
        "stem": "large" if side == 7 else "small",
        "norm": layers.norm_kind(tensors, "bn1", json),
        "channels": channels,
    }
    changes = len(blocks) > 1 or EXPANSION[block] > 1
    if changes and not any(f".{shortcut}." in name for name in tensors):
        derived["shortcut"] = "padded"
    return from_plain_json(ResNetConfig, {**derived, **json})


def _count(tensors: Mapping[str, TensorInfo], stage: str) -> int:
    return len(layers.shapes_of(tensors, lambda i: f"{stage}.{i}.conv1.weight", 4))


def _inputs(config: ResNetConfig) -> jax.ShapeDtypeStruct:
    return layers.images(32, 32, config.channels)


def _family(name: str, shortcut: str, head: str) -> Family:
    return Family(
        name=name,
        config_type=ResNetConfig,
        module=ResNet,
        inputs=_inputs,
        rules=partial(_rules, shortcut, head),
        config_of=partial(_config_of, shortcut, head),
        buffers=batch_counters,
    )


RESNET = _family("resnet", "downsample", "fc")
RESNET_CIFAR = _family("resnet_cifar", "shortcut", "linear")
