"""MLPs: `Sequential` of `Linear` and activations, or layers named `layers.{i}` or `fc{i}`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.converters.families import layers
from jaxmerge.converters.families.family import Family, from_plain_json
from jaxmerge.converters.families.rules import Rule
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.mlp import MLP, MLPConfig


def _sequential(i: int) -> str:
    # Each Linear but the last is followed by an activation, which has no tensors.
    return str(2 * i)


def _numbered(i: int) -> str:
    return f"layers.{i}"


def _counted(i: int) -> str:
    return f"fc{i + 1}"


def _rules(layer: Callable[[int], str], config: MLPConfig) -> list[Rule]:
    return [
        rule
        for i in range(len(config.features) - 1)
        for rule in layers.dense(layer(i), f"params/dense_{i}")
    ]


def _config_of(
    layer: Callable[[int], str], json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> MLPConfig:
    shapes = layers.shapes_of(tensors, lambda i: f"{layer(i)}.weight", 2)
    features = [shapes[0][1], *(shape[0] for shape in shapes)]
    return from_plain_json(MLPConfig, {"features": features, **json})


def _inputs(config: MLPConfig) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, config.features[0]), jnp.float32)


def _family(name: str, layer: Callable[[int], str]) -> Family:
    return Family(
        name=name,
        config_type=MLPConfig,
        module=MLP,
        inputs=_inputs,
        rules=partial(_rules, layer),
        config_of=partial(_config_of, layer),
        prefixes=("net.", "model.", "mlp."),
    )


MLP_SEQUENTIAL = _family("mlp_sequential", _sequential)
MLP_LAYERS = _family("mlp_layers", _numbered)
MLP_FC = _family("mlp_fc", _counted)
