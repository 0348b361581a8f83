"""GPT-2 as Hugging Face lays it out: `Conv1D` weights are [in, out], one projection for queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxmerge.converters.families.causal import (
    causal_apply,
    causal_inputs,
    count,
    layer_count,
    refuse_stacked,
)
from jaxmerge.converters.families.family import Family
from jaxmerge.converters.families.hugging_face import (
    activation_of,
    activation_to,
    require,
    require_config,
)
from jaxmerge.converters.families.layers import embedding, norm
from jaxmerge.converters.families.rules import Rule, Transform, as_is, linear
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.gpt2 import GPT2, GPT2Config

# The transposed layout of `Linear`: outputs are the second axis.
_CONV1D = Transform(outputs=(1,))

_DENSE = {
    "attn.c_attn": "attention/query_key_value",
    "attn.c_proj": "attention/output",
    "mlp.c_fc": "mlp/up",
    "mlp.c_proj": "mlp/down",
}
_NORMS = {"ln_1": "attention_norm", "ln_2": "mlp_norm"}


def _rules(body: str, config: GPT2Config) -> list[Rule]:
    refuse_stacked(config)
    layer, tree = f"{body}h.{{i}}", "params/layers_{i}"
    rules = [
        embedding(f"{body}wte", "params/token_embedding"),
        embedding(f"{body}wpe", "params/position_embedding"),
    ]
    for name, path in _DENSE.items():
        rules += [
            Rule(f"{layer}.{name}.weight", f"{tree}/{path}/kernel", _CONV1D),
            Rule(f"{layer}.{name}.bias", f"{tree}/{path}/bias", as_is()),
        ]
    for name, path in _NORMS.items():
        rules += norm(f"{layer}.{name}", f"{tree}/{path}")
    rules += norm(f"{body}ln_f", "params/norm")
    return (
        rules if config.tied else [*rules, Rule("lm_head.weight", "params/head/kernel", linear())]
    )


def _aliases(body: str, config: GPT2Config) -> Mapping[str, str]:
    return {"lm_head.weight": f"{body}wte.weight"} if config.tied else {}


def _config_of(json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> GPT2Config:
    require_config(json)
    require(json, add_cross_attention=False)
    width = count(json, "n_embd")
    return GPT2Config(
        vocabulary_size=count(json, "vocab_size"),
        context_length=count(json, "n_positions", 1024),
        width=width,
        depth=layer_count(json, "n_layer", tensors),
        heads=count(json, "n_head"),
        mlp_width=count(json, "n_inner", 4 * width),
        activation=activation_of(
            json.get("activation_function", "gelu_new"), "activation_function"
        ),
        norm_epsilon=json.get("layer_norm_epsilon", 1e-5),
        scale_attention=json.get("scale_attn_weights", True),
        scale_by_layer=json.get("scale_attn_by_inverse_layer_idx", False),
        tied=json.get("tie_word_embeddings", True),
    )


def _config_to(config: GPT2Config) -> Mapping[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocabulary_size,
        "n_positions": config.context_length,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "activation_function": activation_to(config.activation),
        "layer_norm_epsilon": config.norm_epsilon,
        "scale_attn_weights": config.scale_attention,
        "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
        "tie_word_embeddings": config.tied,
    }


def _family(name: str, body: str) -> Family:
    return Family(
        name=name,
        config_type=GPT2Config,
        module=GPT2,
        inputs=causal_inputs,
        rules=partial(_rules, body),
        config_of=_config_of,
        config_to=_config_to,
        model_types=("gpt2",),
        aliases=partial(_aliases, body),
        # Causal masks that older versions stored.
        ignored=(f"{body}h.{{i}}.attn.bias", f"{body}h.{{i}}.attn.masked_bias"),
        apply=partial(causal_apply, GPT2),
    )


GPT2_LM = _family("gpt2", "transformer.")
# As the original checkpoints are: the body alone, whose embedding is the head.
GPT2_BODY = _family("gpt2_body", "")
