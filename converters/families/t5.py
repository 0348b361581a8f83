"""T5 in the layout of transformers: encoder and decoder, or the encoder alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families.family import Family
from jaxmerge.converters.families.hugging_face import (
    activation_of,
    require_config,
)
from jaxmerge.converters.families.layers import dense, embedding, norm
from jaxmerge.converters.families.rules import Rule
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.t5 import T5, T5Config


def _rules(config: T5Config) -> list[Rule]:
    rules = [embedding("shared", "params/token_embedding")]
    rules += _stack_rules("encoder", config.num_layers, config, cross=False)
    if config.num_decoder_layers is not None:
        rules += _stack_rules("decoder", config.num_decoder_layers, config, cross=True)
        if not config.tied:
            rules += dense("lm_head", "params/head", bias=False)
    return rules


def _stack_rules(stack: str, layers: int, config: T5Config, *, cross: bool) -> list[Rule]:
    # The first block holds the table of positions that all blocks use.
    rules = [
        embedding(
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
            f"params/{stack}/position_bias",
        )
    ]
    layer, path = f"{stack}.block.{{i}}.layer", f"params/{stack}/layers_{{i}}"
    if layers:
        rules += _attention_rules(f"{layer}.0", "SelfAttention", f"{path}/attention")
        if cross:
            rules += _attention_rules(f"{layer}.1", "EncDecAttention", f"{path}/cross_attention")
        last = 2 if cross else 1
        maps = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
        for name, part in {**maps, "wo": "down"}.items():
            rules += dense(
                f"{layer}.{last}.DenseReluDense.{name}", f"{path}/feed_forward/{part}", bias=False
            )
        rules += norm(f"{layer}.{last}.layer_norm", f"{path}/feed_forward_norm", bias=None)
    return [*rules, *norm(f"{stack}.final_layer_norm", f"params/{stack}/norm", bias=None)]


def _attention_rules(layer: str, name: str, path: str) -> list[Rule]:
    rules = []
    for letter, part in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
        rules += dense(f"{layer}.{name}.{letter}", f"{path}/{part}", bias=False)
    return [*rules, *norm(f"{layer}.layer_norm", f"{path}_norm", bias=None)]


def _aliases(config: T5Config) -> dict[str, str]:
    names = ["encoder.embed_tokens.weight"]
    if config.num_decoder_layers is not None:
        names.append("decoder.embed_tokens.weight")
        if config.tied:
            names.append("lm_head.weight")
    return dict.fromkeys(names, "shared.weight")


def _config_of(json: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> T5Config:
    require_config(json)
    gated, activation = _feed_forward(json.get("feed_forward_proj", "relu"))
    # transformers 5 writes that heads are tied even where they are not, and has this field instead.
    scaled = json.get("scale_decoder_outputs", json.get("tie_word_embeddings", True) is not False)
    decodes = any(name.startswith("decoder.") for name in tensors)
    return T5Config(
        vocab_size=json["vocab_size"],
        hidden_size=json["d_model"],
        head_size=json["d_kv"],
        intermediate_size=json["d_ff"],
        num_layers=json["num_layers"],
        num_decoder_layers=_decoder_layers(json) if decodes else None,
        num_heads=json["num_heads"],
        buckets=json.get("relative_attention_num_buckets", 32),
        max_distance=json.get("relative_attention_max_distance", 128),
        norm_eps=json.get("layer_norm_epsilon", 1e-6),
        activation=activation,
        gated=gated,
        tied=scaled or "lm_head.weight" not in tensors,
        scaled=scaled,
    )


def _decoder_layers(json: Mapping[str, Any]) -> int:
    layers = json.get("num_decoder_layers")
    return json["num_layers"] if layers is None else layers


def _feed_forward(text: Any) -> tuple[bool, str]:
    if text == "gated-gelu":
        return True, "gelu_tanh"
    first, dash, act = str(text).rpartition("-")
    if dash and first != "gated":
        raise CheckpointError(
            f"config.json: feed_forward_proj {text!r}: expected an activation function, or 'gated-' and one"
        )
    return bool(dash), activation_of(act, "feed_forward_proj")


def _config_to(config: T5Config) -> dict[str, Any]:
    activation = "gelu_new" if config.activation == "gelu_tanh" else config.activation
    text = f"gated-{activation}" if config.gated else activation
    decodes = config.num_decoder_layers is not None
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration" if decodes else "T5EncoderModel"],
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": config.head_size,
        "d_ff": config.intermediate_size,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_decoder_layers if decodes else config.num_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": "gated-gelu" if text == "gated-gelu_new" else text,
        "tie_word_embeddings": config.scaled,
        "scale_decoder_outputs": config.scaled,
    }


def _inputs(config: T5Config) -> Any:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if config.num_decoder_layers is None:
        return ids
    return {"input_ids": ids, "decoder_input_ids": ids}


T5_STACKS = Family(
    name="t5",
    config_type=T5Config,
    module=T5,
    inputs=_inputs,
    rules=_rules,
    config_of=_config_of,
    config_to=_config_to,
    aliases=_aliases,
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
)
