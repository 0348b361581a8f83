"""What the tables of causal language models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxmerge.converters.families.family import ApplyFn, Config
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
