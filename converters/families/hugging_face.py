"""What the tables of Hugging Face layouts share: the fields of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.models.activations import ACTIVATIONS

# Where transformers calls a function by another name than `ACTIVATIONS`.
_RENAMED = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}


def require_config(json: Mapping[str, Any]) -> None:
    """Raises a CheckpointError where there is no config.json, as the tensors do not tell everything."""
    if not json:
        raise CheckpointError(
            "needs config.json, or its fields as config={...}: the tensors do not tell the number of attention heads"
        )


def require(json: Mapping[str, Any], **expected: Any) -> None:
    """Raises a CheckpointError where a field says otherwise; a missing field says nothing.

    Example:
      >>> require({"is_decoder": False}, is_decoder=False, position_embedding_type="absolute")
    """
    for key, value in expected.items():
        if json.get(key, value) != value:
            raise CheckpointError(
                f"config.json: {key} {json[key]!r} is not supported, only {value!r}"
            )


def heads_of(json: Mapping[str, Any], heads: str, size: str) -> int:
    """The number of attention heads, checked to divide the features."""
    if json[heads] < 1 or json[size] % json[heads]:
        raise CheckpointError(
            f"config.json: {size} {json[size]} is not a multiple of {heads} {json[heads]}"
        )
    return json[heads]


def activation_of(name: Any, key: str = "hidden_act") -> str:
    """The key of `ACTIVATIONS` of a function in config.json.

    Example:
      >>> activation_of("gelu_new"), activation_of("relu")
      ('gelu_tanh', 'relu')
    """
    known = _RENAMED.get(name, name) if isinstance(name, str) else name
    if known not in ACTIVATIONS:
        names = [*ACTIVATIONS, *_RENAMED]
        raise CheckpointError(
            f"config.json: {key} {name!r} is not supported.{nearest(str(name), names)} Supported: {', '.join(names)}"
        )
    return known


def activation_to(name: str) -> str:
    """The inverse of `activation_of`: one of the names by which transformers knows the function.

    Example:
      >>> activation_to("gelu_tanh")
      'gelu_pytorch_tanh'
    """
    return "gelu_pytorch_tanh" if name == "gelu_tanh" else name
