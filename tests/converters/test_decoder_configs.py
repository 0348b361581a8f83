"""Decoders' config.json: exact round trips over configurations, old and new fields, what is not supported."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_round_trip, random_checkpoint

from jaxmerge.converters import (
    CheckpointError,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_model,
)
from jaxmerge.converters.families import get
from jaxmerge.models import (
    DecoderConfig,
    DynamicScaling,
    GPT2Config,
    LayerKind,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rotary,
    YarnScaling,
)

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"]

SCALINGS = st.one_of(
    st.none(),
    st.builds(LinearScaling, st.floats(1, 8)),
    st.builds(DynamicScaling, st.floats(1, 8), st.just(64)),
    st.builds(Llama3Scaling, st.floats(1, 8), st.just(1.0), st.floats(2, 8), st.integers(8, 32)),
    st.builds(
        YarnScaling,
        st.floats(1, 8),
        st.integers(8, 32),
        st.none() | st.floats(0.5, 2),
        st.floats(8, 32),
        st.floats(0.5, 2),
        mscale=st.none() | st.floats(0.5, 2),
        truncate=st.booleans(),
    ),
    st.builds(
        LongRopeScaling,
        st.just((1.0, 1.5)),
        st.just((1.0, 3.0)),
        st.integers(8, 32),
        st.floats(1, 8),
        st.none() | st.floats(0.5, 2),
    ),
)
ROTARIES = st.builds(Rotary, st.floats(10, 1e6), SCALINGS)


@st.composite
def decoder_configs(draw: st.DrawFn) -> tuple[str, DecoderConfig]:
    """A family and a config that its config.json can express."""
    family = draw(st.sampled_from(DECODERS))
    depth, key_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    bias, rotary = draw(st.booleans()), draw(ROTARIES)
    gemma, numbered = family.startswith("gemma"), family in ("gemma2", "gemma3_text")
    window = draw(st.integers(1, 9))
    windows: list[int | None] = [None] * depth
    if family == "mistral" and draw(st.booleans()):
        windows = [window] * depth
    elif family in ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text"):
        windows = draw(st.lists(st.sampled_from([None, window]), min_size=depth, max_size=depth))
    layers = [LayerKind(one, rotary) for one in windows]
    if family == "smollm3":
        layers = [draw(st.sampled_from([one, replace(one, rotary=None)])) for one in layers]
        layers[0] = replace(layers[0], rotary=rotary)
    elif family == "gemma3_text":
        local = Rotary(draw(st.floats(10, 1e6)))
        layers = [LayerKind(window, local) if one.window else one for one in layers]
        layers = [LayerKind(None, rotary), LayerKind(window, local), *layers]
    return family, DecoderConfig(
        vocabulary_size=draw(st.integers(2, 9)),
        width=draw(st.integers(1, 4)) * 2,
        layers=tuple(layers),
        heads=key_heads * draw(st.integers(1, 2)),
        key_heads=key_heads,
        head_width=4,
        mlp_width=draw(st.integers(1, 6)),
        context_length=64,
        activation="gelu_tanh" if gemma else draw(st.sampled_from(["silu", "relu"])),
        norm_epsilon=draw(st.floats(1e-8, 1e-4)),
        norm_offset=float(gemma),
        attention_bias={"qwen2": True, "mistral": False}.get(family, bias),
        output_bias={"qwen2": False, "mistral": False}.get(family, bias),
        mlp_bias=family in ("llama", "smollm3") and draw(st.booleans()),
        query_key_norm=family in ("qwen3", "gemma3_text"),
        output_norms=numbered,
        scale_embedding=gemma,
        score_width=draw(st.integers(1, 300)) if numbered else None,
        attention_softcap=draw(st.none() | st.floats(1, 60)) if family == "gemma2" else None,
        logits_softcap=draw(st.none() | st.floats(1, 60)) if numbered else None,
        tied=draw(st.booleans()),
    )


@settings(max_examples=25)
@given(decoder_configs())
def test_round_trips_of_decoders_are_exact(drawn: tuple[str, DecoderConfig]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip(*drawn, Path(folder))


@settings(max_examples=8)
@given(
    family=st.sampled_from(["gpt2", "gpt2_body"]),
    config=st.builds(
        GPT2Config,
        vocabulary_size=st.integers(2, 9),
        context_length=st.integers(1, 9),
        width=st.sampled_from([2, 4]),
        depth=st.integers(1, 3),
        heads=st.integers(1, 2),
        mlp_width=st.integers(1, 9),
        activation=st.sampled_from(["relu", "gelu_tanh"]),
        norm_epsilon=st.floats(1e-8, 1e-4),
        scale_attention=st.booleans(),
        scale_by_layer=st.booleans(),
        tied=st.booleans(),
    ),
)
def test_round_trips_of_gpt2_are_exact(family: str, config: GPT2Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip(family, config, Path(folder))


LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def read(**changes: Any) -> DecoderConfig:
    json = {**LLAMA, **changes}
    return get(json["model_type"]).config_of(json, {})


def test_rope_is_read_where_either_version_of_transformers_writes_it() -> None:
    values = {"factor": 2.0, "original_max_position_embeddings": 16}
    expected = Rotary(700.0, YarnScaling(2.0, 16))
    new = read(rope_parameters={"rope_theta": 700.0, "rope_type": "yarn", **values})
    old = read(rope_theta=700.0, rope_scaling={"type": "yarn", **values})
    assert {one.rotary for config in (new, old) for one in config.layers} == {expected}
    assert read(rope_theta=700.0).layers[0].rotary == Rotary(700.0)
    assert read().layers[0].rotary == Rotary(10_000.0)
    gemma = read(model_type="gemma3_text", rope_theta=800.0, rope_local_base_freq=60.0)
    assert [one.rotary.theta for one in gemma.layers] == [60.0, 60.0]
    gemma = read(model_type="gemma3_text", sliding_window_pattern=2, rope_theta=800.0)
    assert [(one.window, one.rotary.theta) for one in gemma.layers] == [(4096, 1e4), (None, 800.0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "yarrn", "factor": 2.0}},
            "RoPE scaling 'yarrn' is not supported. Nearest: 'yarn'. Known: default, linear, dynamic",
        ),
        ({"rope_scaling": {"type": "mrope"}}, "RoPE scaling 'mrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "RoPE scaling 'linear' lacks 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_theta": -1.0}, "expected rope_theta above 1, found -1.0"),
        (
            {"model_type": "smollm3", "no_rope_layer_interval": 0},
            "as no_rope_layer_interval, found 0",
        ),
        ({"hidden_act": "sillu"}, "hidden_act 'sillu' is not supported. Nearest: 'silu'"),
        ({"num_key_value_heads": 3}, "3 key heads do not divide 4 query heads"),
        ({"head_dim": 7}, "even head width, found 7"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "has 1 entries for 2 layers"),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]},
            "layer type 'chunked_attention' is not supported",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
            "no window is set",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "has 1 entries for 2 layers"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "is not supported"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 5.0}},
            r"needs 'full_attention' and 'sliding_attention', found \['rope_theta'\]",
        ),
    ],
)
def test_what_a_config_says_that_is_not_supported_is_an_error(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((CheckpointError, ValueError), match=message):
        read(**changes)


def test_a_config_that_a_family_cannot_express_is_not_written() -> None:
    config = replace(read(), query_key_norm=True)
    with pytest.raises(CheckpointError, match=r"llama.*cannot express query_key_norm True"):
        get("llama").json(config)


@pytest.mark.parametrize(
    ("change", "tensors", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarnn"}}, {}, "RoPE scaling 'yarnn' is not supported"),
        (
            {"intermediate_size": 40},
            {},
            r"mlp.gate_proj.weight' expected \[40, 32\], found \[48, 32\]",
        ),
        ({"num_key_value_heads": 4}, {}, r"k_proj.weight' expected \[32, 32\], found \[16, 32\]"),
        (
            {"num_hidden_layers": 3},
            {},
            r"missing 'model.layers.2.self_attn.k_proj.weight', .* and 1 more",
        ),
        ({"num_hidden_layers": 1}, {}, r"unexpected 'model.layers.1.self_attn.k_proj.weight', "),
        ({"model_type": "qwen2"}, {}, "missing 'model.layers.0.self_attn.k_proj.bias', "),
        (
            {"model_type": "lama"},
            {},
            r"model_type 'lama', which no family reads.* Nearest: 'llama'",
        ),
        ({"vocab_size": None}, {}, "config.json lacks 'vocab_size'"),
        ({"hidden_size": "32"}, {}, "a whole number above 0 as hidden_size, found '32'"),
        ({"model_type": "mistral", "sliding_window": 0}, {}, "above 0 as sliding_window, found 0"),
        ({"num_hidden_layers": 10**12}, {}, "num_hidden_layers = 1000000000000, the checkpoint 21"),
        ({}, {"lm_head.weight": None}, "missing 'lm_head.weight'"),
        ({"tie_word_embeddings": True}, {}, "'lm_head.weight' tied to 'model.embed_tokens.weight'"),
        ({}, {"model.layers.0.mlp.extra": 3}, "unexpected 'model.layers.0.mlp.extra'"),
    ],
)
def test_checkpoints_that_do_not_fit_say_so(
    tmp_path: Path, change: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    found = dict(random_checkpoint("llama", read()))
    for name, size in tensors.items():
        if size is None:
            del found[name]
        else:
            found[name] = np.zeros(size, np.float32)
    save_checkpoint(tmp_path, found)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **change}))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_without_config_json_a_decoder_is_not_guessed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, random_checkpoint("llama", read()))
    with pytest.raises(CheckpointError, match=r"needs config\.json"):
        load_model(tmp_path, family="llama")
    _, _, config = load_model(tmp_path, config=LLAMA)
    assert config.model == read()


def test_a_config_that_families_share_is_of_the_one_that_config_json_names(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, random_checkpoint("llama", read()))
    half = replace(read(), dtype="bfloat16")
    with pytest.raises(CheckpointError, match="fits several families, name one of them: llama"):
        load_model(tmp_path, config=half)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    _, _, loaded = load_model(tmp_path, config=half)
    assert (loaded.family, loaded.model) == ("llama", half)
    with pytest.raises(CheckpointError, match="layers apart, found a config with stacked=True"):
        load_model(tmp_path, config=replace(half, stacked=True))


def test_a_body_of_gpt2_with_its_old_buffers_is_read(tmp_path: Path) -> None:
    config = GPT2Config(9, 4, 4, 2, 2, 8)
    tensors = dict(random_checkpoint("gpt2_body", config))
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, 4, 4), np.float32) for i in range(2)}
    save_checkpoint(tmp_path / "old", {**tensors, **masks})
    text = {"model_type": "gpt2", "vocab_size": 9, "n_positions": 4, "n_embd": 4}
    text |= {"n_layer": 2, "n_head": 2, "n_inner": 8}
    (tmp_path / "old" / "config.json").write_text(json.dumps(text))
    _, params, loaded = load_model(tmp_path / "old")
    assert (loaded.family, loaded.model) == ("gpt2_body", config)
    save_model(tmp_path / "new", params, loaded)
    assert set(load_checkpoint(tmp_path / "new")) == set(tensors)
