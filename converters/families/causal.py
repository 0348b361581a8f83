"""What the tables of causal language models share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families.family import ApplyFn, Config
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.causal import CausalLM
from jaxmerge.models.inputs import named_inputs


def causal_inputs(config: Config) -> jax.ShapeDtypeStruct:
    """One token."""
    return jax.ShapeDtypeStruct((1, 1), jnp.int32)


def causal_apply(module: Callable[[Config], CausalLM], config: Config) -> ApplyFn:
    """(params, token ids, or a dict of them and an attention mask) -> logits float32 [batch, length, vocabulary]."""
    model = module(config)

    def apply(params: Any, inputs: Any) -> jax.Array:
        given = named_inputs(inputs, ["input_ids"], ["attention_mask", "position_ids"])
        optional = given.get("attention_mask"), given.get("position_ids")
        return cast(jax.Array, model.apply(params, given["input_ids"], *optional))

    return apply


def refuse_stacked(config: Config) -> None:
    """Raises a CheckpointError for a config of stacked layers: a checkpoint has a tensor per layer.

    Example:
      >>> from jaxmerge.models import GPT2Config
      >>> refuse_stacked(GPT2Config(9, 4, 4, 2, 2, 8))
    """
    if config.stacked:
        raise CheckpointError(
            "a checkpoint has its layers apart, found a config with stacked=True: load with stacked=False, then call "
            "stack_model; what is stacked already is taken apart by unstack_model"
        )


def count(json: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A number of things in config.json.

    Args:
      json: config.json.
      key: its key.
      default: where it is missing or null; None: it must be there.

    Raises:
      CheckpointError: it is missing, or no whole number above 0.

    Example:
      >>> count({"heads": 4}, "heads"), count({"heads": None}, "heads", 8)
      (4, 8)
    """
    value = default if json.get(key) is None else json[key]
    if value is None:
        raise CheckpointError(f"config.json lacks {key!r}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"config.json: expected a whole number above 0 as {key}, found {value!r:.80}"
        )
    return value


def layer_count(json: Mapping[str, Any], key: str, tensors: Mapping[str, TensorInfo]) -> int:
    """The number of layers, each of which has tensors: a hostile number is refused before anything is made for it."""
    layers = count(json, key)
    if tensors and layers > len(tensors):
        raise CheckpointError(f"config.json: {key} {layers}, but there are {len(tensors)} tensors")
    return layers
