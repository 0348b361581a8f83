"""Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, SmolLM 3 (SmolLM 2 is a Llama) as Hugging Face lays them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families import rope
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
from jaxmerge.converters.families.layers import dense, embedding, norm
from jaxmerge.converters.families.rules import Rule, linear
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.models.decoder import Decoder, DecoderConfig, LayerKind
from jaxmerge.models.rotary import Rotary

Json = Mapping[str, Any]

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _rules(config: DecoderConfig) -> list[Rule]:
    refuse_stacked(config)
    layer, tree = "model.layers.{i}", "params/layers_{i}"
    attention, ours = f"{layer}.self_attn", f"{tree}/attention"
    rules = [embedding("model.embed_tokens", "params/token_embedding")]
    rules += _rms("input_layernorm", "attention_norm")
    for name, path in {"q_proj": "query", "k_proj": "key", "v_proj": "value"}.items():
        rules += dense(f"{attention}.{name}", f"{ours}/{path}", bias=config.attention_bias)
    rules += dense(f"{attention}.o_proj", f"{ours}/output", bias=config.output_bias)
    if config.query_key_norm:
        rules += norm(f"{attention}.q_norm", f"{ours}/query_norm", bias=None)
        rules += norm(f"{attention}.k_norm", f"{ours}/key_norm", bias=None)
    if config.output_norms:
        rules += _rms("post_attention_layernorm", "attention_output_norm")
        rules += _rms("pre_feedforward_layernorm", "mlp_norm")
        rules += _rms("post_feedforward_layernorm", "mlp_output_norm")
    else:
        rules += _rms("post_attention_layernorm", "mlp_norm")
    for name in ("gate", "up", "down"):
        rules += dense(f"{layer}.mlp.{name}_proj", f"{tree}/mlp/{name}", bias=config.mlp_bias)
    rules += norm("model.norm", "params/norm", bias=None)
    return (
        rules if config.tied else [*rules, Rule("lm_head.weight", "params/head/kernel", linear())]
    )


def _rms(name: str, path: str) -> list[Rule]:
    return norm(f"model.layers.{{i}}.{name}", f"params/layers_{{i}}/{path}", bias=None)


def _aliases(config: DecoderConfig) -> Mapping[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {}


@dataclass(frozen=True)
class _Type:
    """What one `model_type` of config.json implies.

    Attributes:
      name: the `model_type`.
      architecture: transformers' class.
      read: config.json -> those fields of `DecoderConfig` that the types differ in.
      keys: what its config.json has beside the keys that all types share.
      tied: where config.json does not say.
    """

    name: str
    architecture: str
    read: Callable[[Json], dict[str, Any]]
    keys: tuple[str, ...]
    tied: bool = False


def _config_of(kind: _Type, json: Json, tensors: Mapping[str, TensorInfo]) -> DecoderConfig:
    require_config(json)
    if json.get("use_bidirectional_attention"):
        raise CheckpointError("config.json: use_bidirectional_attention is not supported")
    layer_count(json, "num_hidden_layers", tensors)
    width, heads = count(json, "hidden_size"), count(json, "num_attention_heads")
    own = {
        "key_heads": count(json, "num_key_value_heads", heads),
        "head_width": count(json, "head_dim", width // heads),
        "activation": activation_of(json.get("hidden_act", "silu")),
        **kind.read(json),
    }
    return DecoderConfig(
        vocabulary_size=count(json, "vocab_size"),
        width=width,
        heads=heads,
        mlp_width=count(json, "intermediate_size"),
        context_length=count(json, "max_position_embeddings", 2048),
        norm_epsilon=json.get("rms_norm_eps", 1e-6),
        tied=json.get("tie_word_embeddings", kind.tied),
        **own,
    )


def _config_to(kind: _Type, config: DecoderConfig) -> Json:
    windows = {one.window for one in config.layers} - {None}
    types = [_FULL if one.window is None else _SLIDING for one in config.layers]
    activation = activation_to(config.activation)
    options = {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": activation,
        "hidden_activation": activation,
        "sliding_window": next(iter(windows), None),
        "use_sliding_window": bool(windows),
        "layer_types": types,
        "no_rope_layers": [int(one.rotary is not None) for one in config.layers],
        "query_pre_attn_scalar": config.score_width,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logits_softcap,
        **_written_rotary(config, local="rope_local_base_freq" in kind.keys),
    }
    json = {
        "architectures": [kind.architecture],
        "model_type": kind.name,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        **{key: options[key] for key in ("rope_theta", "rope_scaling", *kind.keys)},
    }
    _check_expressed(kind, config, _config_of(kind, json, {}))
    return json


def _check_expressed(kind: _Type, config: DecoderConfig, read: DecoderConfig) -> None:
    """Refuses a config of which the config.json of this type says something else."""
    wanted, found = (
        asdict(config),
        asdict(replace(read, dtype=config.dtype, stacked=config.stacked)),
    )
    differing = [name for name, value in wanted.items() if found[name] != value]
    if differing:
        said = "; ".join(f"{name} {getattr(config, name)!r}" for name in differing)
        raise CheckpointError(f"family {kind.name}: its config.json cannot express {said:.500}")


def _written_rotary(config: DecoderConfig, *, local: bool) -> Json:
    """The keys of the rotary embeddings; `local`: windowed layers have their own."""
    shared = [one.rotary for one in config.layers if not (local and one.window is not None)]
    rotaries = [one for one in shared if one is not None] or [Rotary()]
    windowed = [one.rotary for one in config.layers if one.window is not None and one.rotary]
    return {
        **rope.written(rotaries[0]),
        "rope_local_base_freq": windowed[0].theta if windowed else 10_000.0,
    }


def _window(json: Json, default: int | None) -> int | None:
    present = json.get("sliding_window", default) is not None
    return count(json, "sliding_window", default) if present else None


def _windows(json: Json, types: Sequence[str], window: int | None) -> list[int | None]:
    """Each layer's window, by `layer_types` or what stands for it."""
    types = json.get("layer_types") or types
    if len(types) != json["num_hidden_layers"]:
        raise CheckpointError(
            f"config.json: layer_types has {len(types)} entries for {json['num_hidden_layers']} layers"
        )
    for one in types:
        if one not in (_FULL, _SLIDING):
            raise CheckpointError(f"config.json: layer type {one!r} is not supported")
    if _SLIDING in types and window is None:
        raise CheckpointError(f"config.json: layer_types has {_SLIDING!r}, but no window is set")
    return [window if one == _SLIDING else None for one in types]


def _layers(json: Json, windows: Sequence[int | None], *, theta: float = 1e4) -> dict[str, Any]:
    rotary = rope.rotary_of(json, theta=theta)
    return {"layers": tuple(LayerKind(window, rotary) for window in windows)}


def _llama(json: Json) -> dict[str, Any]:
    bias = json.get("attention_bias", False)
    return {
        **_layers(json, [None] * json["num_hidden_layers"]),
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": json.get("mlp_bias", False),
    }


def _mistral(json: Json) -> dict[str, Any]:
    windows = [_window(json, 4096)] * json["num_hidden_layers"]
    heads = {} if "num_key_value_heads" in json else {"key_heads": 8}
    return {**_layers(json, windows), **heads}


def _qwen_layers(json: Json) -> dict[str, Any]:
    window = _window(json, 4096) if json.get("use_sliding_window") else None
    first = json["num_hidden_layers"] if window is None else json.get("max_window_layers", 28)
    types = [_FULL if i < first else _SLIDING for i in range(json["num_hidden_layers"])]
    return _layers(json, _windows(json, types, window))


def _qwen2(json: Json) -> dict[str, Any]:
    return {**_qwen_layers(json), "attention_bias": True}


def _qwen3(json: Json) -> dict[str, Any]:
    bias = json.get("attention_bias", False)
    return {
        **_qwen_layers(json),
        "head_width": count(json, "head_dim", 128),
        "attention_bias": bias,
        "output_bias": bias,
        "query_key_norm": True,
    }


def _smollm3(json: Json) -> dict[str, Any]:
    depth = json["num_hidden_layers"]
    every = count(json, "no_rope_layer_interval", 4)
    turned = json.get("no_rope_layers") or [(i + 1) % every for i in range(depth)]
    if len(turned) != depth:
        raise CheckpointError(
            f"config.json: no_rope_layers has {len(turned)} entries for {depth} layers"
        )
    window = _window(json, None) if json.get("use_sliding_window") else None
    types = [_FULL if window is None or one else _SLIDING for one in turned]
    rotary = rope.rotary_of(json, theta=2e6)
    bias = json.get("attention_bias", False)
    return {
        "layers": tuple(
            LayerKind(window, rotary if turns else None)
            for window, turns in zip(_windows(json, types, window), turned, strict=True)
        ),
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": json.get("mlp_bias", False),
    }


def _gemma(json: Json) -> dict[str, Any]:
    # "gelu" stands in old files, but the tanh approximation is meant.
    activation = json.get("hidden_act", "gelu_pytorch_tanh")
    return {
        **_layers(json, [None] * json["num_hidden_layers"]),
        **_gemma_switches(json),
        "activation": activation_of("gelu_pytorch_tanh" if activation == "gelu" else activation),
    }


def _gemma2(json: Json) -> dict[str, Any]:
    types = [_FULL if i % 2 else _SLIDING for i in range(json["num_hidden_layers"])]
    windows = _windows(json, types, _window(json, 4096))
    return {
        **_layers(json, windows),
        **_gemma_switches(json),
        "activation": activation_of(json.get("hidden_activation", "gelu_pytorch_tanh")),
        "output_norms": True,
        "score_width": json.get("query_pre_attn_scalar", 256),
        "attention_softcap": json.get("attn_logit_softcapping", 50.0),
        "logits_softcap": json.get("final_logit_softcapping", 30.0),
    }


def _gemma3(json: Json) -> dict[str, Any]:
    require(json, attn_logit_softcapping=None)
    every = count(json, "sliding_window_pattern", 6)
    types = [_SLIDING if (i + 1) % every else _FULL for i in range(json["num_hidden_layers"])]
    windows = _windows(json, types, _window(json, 4096))
    whole, local = _gemma3_rotaries(json)
    return {
        "layers": tuple(LayerKind(one, whole if one is None else local) for one in windows),
        **_gemma_switches(json),
        "activation": activation_of(json.get("hidden_activation", "gelu_pytorch_tanh")),
        "query_key_norm": True,
        "output_norms": True,
        "score_width": json.get("query_pre_attn_scalar", 256),
        "logits_softcap": json.get("final_logit_softcapping"),
    }


def _gemma3_rotaries(json: Json) -> tuple[Rotary, Rotary]:
    """Of the layers that see everything and of the windowed ones."""
    nested = json.get("rope_parameters") or {}
    if set(nested) - {_FULL, _SLIDING}:
        raise CheckpointError(
            f"config.json: rope_parameters of gemma3_text needs {_FULL!r} and {_SLIDING!r}, found {sorted(nested)}"
        )
    whole = {**(nested.get(_FULL) or {}), **(json.get("rope_scaling") or {})}
    local = nested.get(_SLIDING) or {}
    return (
        rope.parse(whole, json, theta=json.get("rope_theta") or 1e6),
        rope.parse(local, json, theta=json.get("rope_local_base_freq") or 1e4),
    )


def _gemma_switches(json: Json) -> dict[str, Any]:
    bias = json.get("attention_bias", False)
    return {
        "head_width": count(json, "head_dim", 256),
        "norm_offset": 1.0,
        "scale_embedding": True,
        "attention_bias": bias,
        "output_bias": bias,
    }


_TYPES = (
    _Type("llama", "LlamaForCausalLM", _llama, ("attention_bias", "mlp_bias", "hidden_act")),
    _Type("mistral", "MistralForCausalLM", _mistral, ("sliding_window", "hidden_act")),
    _Type(
        "qwen2",
        "Qwen2ForCausalLM",
        _qwen2,
        ("sliding_window", "use_sliding_window", "layer_types", "hidden_act"),
    ),
    _Type(
        "qwen3",
        "Qwen3ForCausalLM",
        _qwen3,
        ("attention_bias", "sliding_window", "use_sliding_window", "layer_types", "hidden_act"),
    ),
    _Type(
        "smollm3",
        "SmolLM3ForCausalLM",
        _smollm3,
        (
            "attention_bias",
            "mlp_bias",
            "sliding_window",
            "use_sliding_window",
            "layer_types",
            "no_rope_layers",
            "hidden_act",
        ),
        tied=True,
    ),
    _Type("gemma", "GemmaForCausalLM", _gemma, ("attention_bias", "hidden_act"), tied=True),
    _Type(
        "gemma2",
        "Gemma2ForCausalLM",
        _gemma2,
        (
            "attention_bias",
            "hidden_activation",
            "sliding_window",
            "layer_types",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ),
        tied=True,
    ),
    _Type(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _gemma3,
        (
            "attention_bias",
            "hidden_activation",
            "sliding_window",
            "layer_types",
            "query_pre_attn_scalar",
            "final_logit_softcapping",
            "rope_local_base_freq",
        ),
        tied=True,
    ),
)


def _family(kind: _Type) -> Family:
    return Family(
        name=kind.name,
        config_type=DecoderConfig,
        module=Decoder,
        inputs=causal_inputs,
        rules=_rules,
        config_of=partial(_config_of, kind),
        config_to=partial(_config_to, kind),
        aliases=_aliases,
        # A table of angles that older versions stored.
        ignored=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
        apply=partial(causal_apply, Decoder),
    )


DECODERS = tuple(map(_family, _TYPES))
