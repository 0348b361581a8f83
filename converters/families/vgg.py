"""VGG: `features.{n}`, with one `classifier` (CIFAR) or with `classifier.{0,3,6}` (torchvision)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from math import isqrt
from typing import Any

import jax

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families import layers
from jaxmerge.converters.families.family import Family, batch_counters, from_plain_json
from jaxmerge.converters.families.rules import Rule
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.vgg import VGG, VGGConfig

_CONVOLUTION = re.compile(r"features\.(\d+)\.weight")


def _one_classifier(i: int) -> str:
    # No layout has a second one: such a name is in no checkpoint.
    return f"classifier.{i}" if i else "classifier"


def _spaced_classifier(i: int) -> str:
    # Each Linear but the last is followed by a ReLU and a Dropout.
    return f"classifier.{3 * i}"


def _rules(classifier: Callable[[int], str], config: VGGConfig) -> list[Rule]:
    rules, at = [], 0
    has_norm = config.norm != "none"
    for stage, widths in enumerate(config.stages):
        for i in range(len(widths)):
            rules += layers.conv(f"features.{at}", f"params/conv{stage}_{i}", bias=True)
            rules += layers.norm_of_kind(
                f"features.{at + 1}", f"params/norm{stage}_{i}", config.norm
            )
            at += 3 if has_norm else 2
        at += 1
    features = (config.pool, config.pool, config.stages[-1][-1])
    widths = (*config.hidden, config.classes)
    rules += layers.flattened_dense(classifier(0), "params/dense_0", features, widths[0])
    for i in range(1, len(widths)):
        rules += layers.dense(classifier(i), f"params/dense_{i}")
    return rules


def _config_of(
    classifier: Callable[[int], str], json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> VGGConfig:
    channels = layers.shape_of(tensors, "features.0.weight", 4)[1]
    kind = layers.norm_kind(tensors, "features.1", json)
    step = 2 if kind == "none" else 3
    found = sorted(
        int(match[1])
        for name, info in tensors.items()
        if (match := _CONVOLUTION.fullmatch(name)) and len(info.shape) == 4
    )
    stages: list[list[int]] = []
    for at, before in zip(found, [-step - 1, *found[:-1]], strict=True):
        if at - before not in (step, step + 1):
            raise CheckpointError(f"no convolution 'features.{at}' follows 'features.{before}'")
        if at - before == step + 1:
            stages.append([])
        stages[-1].append(tensors[f"features.{at}.weight"].shape[0])
    widths = layers.shapes_of(tensors, lambda i: f"{classifier(i)}.weight", 2)
    return from_plain_json(
        VGGConfig,
        {
            "stages": stages,
            "hidden": [shape[0] for shape in widths[:-1]],
            "classes": widths[-1][0],
            "pool": isqrt(widths[0][1] // stages[-1][-1]),
            "norm": kind,
            "channels": channels,
            **json,
        },
    )


def _inputs(config: VGGConfig) -> jax.ShapeDtypeStruct:
    side = config.pool * 2 ** len(config.stages)
    return layers.images(side, side, config.channels)


def _family(name: str, classifier: Callable[[int], str]) -> Family:
    return Family(
        name=name,
        config_type=VGGConfig,
        module=VGG,
        inputs=_inputs,
        rules=partial(_rules, classifier),
        config_of=partial(_config_of, classifier),
        buffers=batch_counters,
    )


VGG_TORCHVISION = _family("vgg", _spaced_classifier)
VGG_CIFAR = _family("vgg_cifar", _one_classifier)
