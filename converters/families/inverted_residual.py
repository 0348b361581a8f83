"""MobileNetV2 with torchvision's names, EfficientNet-Lite with those of the package `efficientnet-lite-pytorch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families import layers
from jaxmerge.converters.families.family import Family, batch_counters, from_plain_json
from jaxmerge.converters.families.rules import Rule
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.inverted_residual import (
    EFFICIENTNET_LITE0,
    MOBILENET_V2,
    InvertedResidualConfig,
    InvertedResidualNet,
    Stage,
)


def _pair(convolution: str, norm: str, path: str) -> list[Rule]:
    return [
        *layers.conv(convolution, f"params/{path}/conv"),
        *layers.norm_of_kind(norm, f"params/{path}/norm"),
    ]


def _mobilenet_rules(config: InvertedResidualConfig) -> list[Rule]:
    rules = _pair("features.0.0", "features.0.1", "stem")
    for i, (hidden, *_) in enumerate(config.blocks):
        name, at = f"features.{i + 1}.conv", 0
        if hidden != config.incoming(i):
            rules += _pair(f"{name}.0.0", f"{name}.0.1", f"block_{i}_expand")
            at = 1
        rules += _pair(f"{name}.{at}.0", f"{name}.{at}.1", f"block_{i}_depthwise")
        rules += _pair(f"{name}.{at + 1}", f"{name}.{at + 2}", f"block_{i}_project")
    last = f"features.{len(config.blocks) + 1}"
    return [
        *rules,
        *_pair(f"{last}.0", f"{last}.1", "last"),
        *layers.dense("classifier.1", "params/head"),
    ]


def _efficientnet_rules(config: InvertedResidualConfig) -> list[Rule]:
    rules = _pair("_conv_stem", "_bn0", "stem")
    for i, (hidden, *_) in enumerate(config.blocks):
        name = f"_blocks.{i}"
        if hidden != config.incoming(i):
            rules += _pair(f"{name}._expand_conv", f"{name}._bn0", f"block_{i}_expand")
        rules += _pair(f"{name}._depthwise_conv", f"{name}._bn1", f"block_{i}_depthwise")
        rules += _pair(f"{name}._project_conv", f"{name}._bn2", f"block_{i}_project")
    return [*rules, *_pair("_conv_head", "_bn1", "last"), *layers.dense("_fc", "params/head")]


def _mobilenet_config(
    json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> InvertedResidualConfig:
    names: list[tuple[str, str]] = []
    while f"features.{len(names) + 1}.conv.0.0.weight" in tensors:
        name = f"features.{len(names) + 1}.conv"
        # Two or three convolutions; the last one's name has one number less.
        expanded = f"{name}.1.0.weight" in tensors
        names.append((f"{name}.{int(expanded)}.0", f"{name}.{1 + expanded}"))
    last = f"features.{len(names) + 1}.0"
    derived = _derive(tensors, "features.0.0", names, last, "classifier.1", MOBILENET_V2, json)
    return from_plain_json(InvertedResidualConfig, {**derived, **json})


def _efficientnet_config(
    json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> InvertedResidualConfig:
    names: list[tuple[str, str]] = []
    while f"_blocks.{len(names)}._depthwise_conv.weight" in tensors:
        name = f"_blocks.{len(names)}"
        names.append((f"{name}._depthwise_conv", f"{name}._project_conv"))
    derived = _derive(tensors, "_conv_stem", names, "_conv_head", "_fc", EFFICIENTNET_LITE0, json)
    padding = {"padding": "same", "epsilon": 1e-3}
    return from_plain_json(InvertedResidualConfig, {**padding, **derived, **json})


def _derive(
    tensors: Mapping[str, TensorInfo],
    stem: str,
    blocks: Sequence[tuple[str, str]],
    last: str,
    head: str,
    stages: Sequence[Stage],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The config's fields from the shapes; strides leave no trace there, so they are those of the paper's table."""
    stem_width, channels, *_ = layers.shape_of(tensors, f"{stem}.weight", 4)
    strides = [stage.stride if i == 0 else 1 for stage in stages for i in range(stage.repeats)]
    derived = {
        "stem": stem_width,
        "last": layers.shape_of(tensors, f"{last}.weight", 4)[0],
        "classes": layers.shape_of(tensors, f"{head}.weight", 2)[0],
        "channels": channels,
    }
    if "blocks" in given:
        return derived
    if len(blocks) != len(strides):
        raise CheckpointError(
            f"expected {len(strides)} blocks, found {len(blocks)}: their strides are not in the "
            'tensors; say them: config={"blocks": [[hidden width, width, stride, kernel], ...]}'
        )
    shapes = []
    for (depthwise, project), stride in zip(blocks, strides, strict=True):
        width, _, kernel, _ = layers.shape_of(tensors, f"{depthwise}.weight", 4)
        shapes.append([width, layers.shape_of(tensors, f"{project}.weight", 4)[0], stride, kernel])
    return {**derived, "blocks": shapes}


def _inputs(config: InvertedResidualConfig) -> jax.ShapeDtypeStruct:
    return layers.images(32, 32, config.channels)


MOBILENET = Family(
    name="mobilenet_v2",
    config_type=InvertedResidualConfig,
    module=InvertedResidualNet,
    inputs=_inputs,
    rules=_mobilenet_rules,
    config_of=_mobilenet_config,
    buffers=batch_counters,
)
EFFICIENTNET_LITE = Family(
    name="efficientnet_lite",
    config_type=InvertedResidualConfig,
    module=InvertedResidualNet,
    inputs=_inputs,
    rules=_efficientnet_rules,
    config_of=_efficientnet_config,
    buffers=batch_counters,
)
