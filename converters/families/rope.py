"""Rotary embeddings in config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.models.rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rotary,
    Scaling,
    YarnScaling,
)

Parameters = Mapping[str, Any]


def rotary_of(json: Mapping[str, Any], *, theta: float) -> Rotary:
    """Reads the rotary embedding that all layers share.

    Args:
      json: config.json.
      theta: the base where config.json names none.

    Raises:
      CheckpointError: a type of scaling that is unknown, or that lacks a value.

    Example:
      >>> old = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
      >>> new = {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}}
      >>> rotary_of(old, theta=1.0) == rotary_of(new, theta=1.0)
      True
    """
    parameters = json.get("rope_scaling") or json.get("rope_parameters") or {}
    return parse(parameters, json, theta=json.get("rope_theta") or theta)


def parse(parameters: Parameters, json: Mapping[str, Any], *, theta: float) -> Rotary:
    """One entry of `rope_parameters` or `rope_scaling`; see `rotary_of`."""
    fraction = parameters.get("partial_rotary_factor", json.get("partial_rotary_factor"))
    if fraction not in (None, 1, 1.0):
        raise CheckpointError(f"config.json: partial_rotary_factor {fraction} is not supported")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind != "default" and kind not in _READERS:
        known = ["default", *_READERS]
        raise CheckpointError(
            f"config.json: RoPE scaling {kind!r} is not supported.{nearest(str(kind), known)} "
            f"Known: {', '.join(known)}"
        )
    theta = float(parameters.get("rope_theta") or theta)
    if not theta > 1:
        raise CheckpointError(f"config.json: expected rope_theta above 1, found {theta}")
    if kind == "default":
        return Rotary(theta)
    try:
        return Rotary(theta, _READERS[kind](parameters, json))
    except KeyError as error:
        raise CheckpointError(f"config.json: RoPE scaling {kind!r} lacks {error}") from None


def written(rotary: Rotary) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which every version of transformers reads."""
    scaling = rotary.scaling
    return {
        "rope_theta": rotary.theta,
        "rope_scaling": None if scaling is None else _WRITERS[type(scaling)](scaling),
    }


def _original_length(parameters: Parameters, json: Mapping[str, Any]) -> int:
    for place in (json, parameters):
        if place.get("original_max_position_embeddings") is not None:
            return int(place["original_max_position_embeddings"])
    return int(json["max_position_embeddings"])


def _factor(parameters: Parameters, json: Mapping[str, Any]) -> float:
    if parameters.get("factor") is not None:
        return float(parameters["factor"])
    return float(json["max_position_embeddings"] / _original_length(parameters, json))


def _linear(parameters: Parameters, json: Mapping[str, Any]) -> Scaling:
    return LinearScaling(float(parameters["factor"]))


def _dynamic(parameters: Parameters, json: Mapping[str, Any]) -> Scaling:
    return DynamicScaling(float(parameters["factor"]), int(json["max_position_embeddings"]))


def _llama3(parameters: Parameters, json: Mapping[str, Any]) -> Scaling:
    return Llama3Scaling(
        float(parameters["factor"]),
        float(parameters["low_freq_factor"]),
        float(parameters["high_freq_factor"]),
        _original_length(parameters, json),
    )


def _yarn(parameters: Parameters, json: Mapping[str, Any]) -> Scaling:
    return YarnScaling(
        _factor(parameters, json),
        _original_length(parameters, json),
        attention_factor=parameters.get("attention_factor"),
        beta_fast=parameters.get("beta_fast") or 32.0,
        beta_slow=parameters.get("beta_slow") or 1.0,
        mscale=parameters.get("mscale"),
        mscale_all_dim=parameters.get("mscale_all_dim"),
        truncate=parameters.get("truncate", True),
    )


def _longrope(parameters: Parameters, json: Mapping[str, Any]) -> Scaling:
    return LongRopeScaling(
        tuple(parameters["short_factor"]),
        tuple(parameters["long_factor"]),
        _original_length(parameters, json),
        _factor(parameters, json),
        attention_factor=parameters.get("attention_factor"),
    )


_READERS: dict[str, Callable[[Parameters, Mapping[str, Any]], Scaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}

_WRITERS: dict[type, Callable[[Any], dict[str, Any]]] = {
    LinearScaling: lambda one: {"rope_type": "linear", "factor": one.factor},
    DynamicScaling: lambda one: {"rope_type": "dynamic", "factor": one.factor},
    Llama3Scaling: lambda one: {
        "rope_type": "llama3",
        "factor": one.factor,
        "low_freq_factor": one.low_frequency_factor,
        "high_freq_factor": one.high_frequency_factor,
        "original_max_position_embeddings": one.original_length,
    },
    YarnScaling: lambda one: {
        "rope_type": "yarn",
        "factor": one.factor,
        "original_max_position_embeddings": one.original_length,
        "attention_factor": one.attention_factor,
        "beta_fast": one.beta_fast,
        "beta_slow": one.beta_slow,
        "mscale": one.mscale,
        "mscale_all_dim": one.mscale_all_dim,
        "truncate": one.truncate,
    },
    LongRopeScaling: lambda one: {
        "rope_type": "longrope",
        "short_factor": list(one.short_factor),
        "long_factor": list(one.long_factor),
        "original_max_position_embeddings": one.original_length,
        "factor": one.factor,
        "attention_factor": one.attention_factor,
    },
}
