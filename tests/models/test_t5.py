"""T5: the function of transformers' model, and exact round trips."""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_round_trip, random_checkpoint, random_params
from pretrained import assert_loads_as, assert_pretrained, torch_output, transformers

from jaxmerge.converters import (
    CheckpointError,
    ModelConfig,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_model,
)
from jaxmerge.models import T5, T5Config
from jaxmerge.models.t5 import relative_buckets

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "d_model": 16,
    "d_kv": 5,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
TINY = T5Config(30, 8, 4, 16, 1, 1, 2)
MASK = np.array([[1] * 9, [1] * 6 + [0] * 3])
IDS = np.where(MASK == 1, np.random.default_rng(0).integers(3, 30, (2, 9)), 0)
ENCODED = {"input_ids": IDS, "attention_mask": MASK}
INPUTS = ENCODED | {
    "decoder_input_ids": IDS[:, 1:6],
    "decoder_attention_mask": np.array([[1] * 5, [0, 1, 1, 1, 1]]),
}


def logits(output: Any) -> Any:
    return output.logits


@pytest.mark.torch
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"feed_forward_proj": "gated-silu", "num_decoder_layers": 1, "layer_norm_epsilon": 1e-3},
    ],
)
def test_transformers_computes_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    library = transformers()
    model = library.T5ForConditionalGeneration(library.T5Config(**SIZES, **options))
    config = assert_pretrained(model, INPUTS, logits, tmp_path)
    assert config.model.scaled == options.get("tie_word_embeddings", True)


@pytest.mark.torch
def test_an_encoder_alone_computes_the_same(tmp_path: Path) -> None:
    library = transformers()
    model = library.T5EncoderModel(library.T5Config(**SIZES, feed_forward_proj="gated-gelu"))
    config = assert_pretrained(model, ENCODED, lambda output: output.last_hidden_state, tmp_path)
    assert config.model.num_decoder_layers is None


@pytest.mark.torch
def test_an_untied_head_and_names_of_older_versions_are_read(tmp_path: Path) -> None:
    """As the checkpoints of T5 1.1 are: the head a matrix of its own, the token table under three names."""
    library = transformers()
    options = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    tied = library.T5ForConditionalGeneration(library.T5Config(**SIZES, **options))
    assert_pretrained(tied, INPUTS, logits, tmp_path / "tied")
    tensors = dict(load_checkpoint(tmp_path / "tied/source"))
    table = tensors["shared.weight"]
    tensors["encoder.embed_tokens.weight"] = tensors["decoder.embed_tokens.weight"] = table
    tensors["lm_head.weight"] = table[::-1].copy()
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unused] = np.ones((8, 3), "f4")
    source, target = tmp_path / "source", tmp_path / "target"
    save_checkpoint(source, tensors, metadata={"format": "pt"})
    text = json.loads((tmp_path / "tied/source/config.json").read_text())
    text["tie_word_embeddings"] = text.pop("scale_decoder_outputs")
    (source / "config.json").write_text(json.dumps(text))

    model = library.T5ForConditionalGeneration.from_pretrained(source).eval()
    apply_fn, params, config = load_model(source)
    assert (config.model.tied, config.model.scaled) == (False, False)
    np.testing.assert_allclose(
        jax.jit(apply_fn)(params, INPUTS), torch_output(model, INPUTS, logits), atol=1e-5, rtol=1e-5
    )
    save_model(target, params, config)
    written = load_checkpoint(target)
    assert set(written) == set(tensors) - {unused}
    assert all(np.array_equal(written[name], tensors[name]) for name in written)
    assert_loads_as(model, target, INPUTS, logits)


@pytest.mark.torch
def test_a_model_that_was_made_in_jax_loads_in_transformers(tmp_path: Path) -> None:
    library = transformers()
    config = T5Config(30, 8, 4, 16, 2, 1, 2, activation="gelu_tanh", gated=True, scaled=False)
    params = random_params(T5(config), INPUTS)
    save_model(tmp_path, params, ModelConfig("t5", config))
    model, info = library.T5ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    np.testing.assert_allclose(
        jax.jit(T5(config).apply)(params, INPUTS),
        torch_output(model, INPUTS, logits),
        atol=1e-4,
        rtol=1e-5,
    )
    assert load_model(tmp_path)[2].model == config


@pytest.mark.torch
def test_every_distance_falls_into_transformers_bucket() -> None:
    transformers()
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(300)[None, :] - torch.arange(300)[:, None]
    for buckets, distance in [(32, 128), (8, 12), (16, 64), (32, 20)]:
        for both_ways in (True, False):
            expected = T5Attention._relative_position_bucket(offset, both_ways, buckets, distance)
            found = relative_buckets(300, buckets, distance, both_ways=both_ways)
            np.testing.assert_array_equal(found, expected.numpy())


@settings(max_examples=10)
@given(
    layers=st.integers(1, 2),
    decoder_layers=st.sampled_from([None, 1, 2]),
    heads=st.integers(1, 3),
    head_size=st.integers(1, 3),
    size=st.integers(1, 5),
    gated=st.booleans(),
    tied=st.booleans(),
)
def test_round_trips_are_exact(
    layers: int,
    decoder_layers: int | None,
    heads: int,
    head_size: int,
    size: int,
    gated: bool,
    tied: bool,
) -> None:
    model = T5Config(
        vocab_size=5,
        hidden_size=size,
        head_size=head_size,
        intermediate_size=4,
        num_layers=layers,
        num_decoder_layers=decoder_layers,
        num_heads=heads,
        buckets=4,
        gated=gated,
        tied=tied or decoder_layers is None,
        scaled=tied or decoder_layers is None,
    )
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip("t5", model, Path(folder))


def test_bfloat16_computes_near_float32() -> None:
    params = random_params(T5(TINY), INPUTS)
    half = jax.jit(T5(T5Config(30, 8, 4, 16, 1, 1, 2, dtype="bfloat16")).apply)(params, INPUTS)
    assert half.dtype == "bfloat16"
    np.testing.assert_allclose(
        half.astype("float32"), jax.jit(T5(TINY).apply)(params, INPUTS), atol=0.05, rtol=0.05
    )


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"feed_forward_proj": "geglu"}, {}, "feed_forward_proj 'geglu' is not supported"),
        (
            {"feed_forward_proj": "double-gelu"},
            {},
            "'double-gelu': expected an activation function",
        ),
        (
            {},
            {"decoder.block.0.layer.1.EncDecAttention.q.weight": None},
            "missing 'decoder.block.0.layer.1.EncDecAttention.q.weight'",
        ),
        ({}, {"decoder.embed_tokens.weight": np.ones((30, 8), "f4")}, "tied to 'shared.weight'"),
        ({}, {"classification_head.dense.weight": np.ones((8, 8), "f4")}, "unexpected 'class"),
        ({"d_kv": 3}, {}, r"k.weight' expected \[6, 8\], found \[8, 8\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, fields: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    changed = {**random_checkpoint("t5", TINY), **tensors}
    save_checkpoint(tmp_path, {name: one for name, one in changed.items() if one is not None})
    text = {"model_type": "t5", "vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 16}
    text |= {"num_layers": 1, "num_heads": 2} | fields
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_bare_array_is_refused_where_the_decoder_needs_tokens_too() -> None:
    with pytest.raises(ValueError, match="a dict with inputs 'input_ids', 'decoder_input_ids'"):
        jax.eval_shape(T5(TINY).init, jax.random.key(0), IDS)
