"""Decoders: transformers' logits, exact round trips, folders that transformers loads, bad configurations."""

import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest
from parity import randomise

from jaxmerge.converters import load_checkpoint, load_model, save_model
from jaxmerge.converters.families import get

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0]}
FOUR = {"num_hidden_layers": 4}
MIXED = ["full_attention", "sliding_attention"] * 2


def scaled(**parameters: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {"rope_theta": 500.0, **parameters},
        "max_position_embeddings": 64,
        "num_hidden_layers": 1,
    }


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
    "llama: biases, wide heads, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "tie_word_embeddings": True},
    ),
    "llama: one key head": ("llama", {"num_key_value_heads": 1, "hidden_act": "gelu"}),
    "llama: linear": ("llama", scaled(rope_type="linear", factor=3.0)),
    "llama: dynamic": (
        "llama",
        {**scaled(rope_type="dynamic", factor=2.0), "max_position_embeddings": 7},
    ),
    "llama: llama3": (
        "llama",
        scaled(
            rope_type="llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama: yarn": (
        "llama",
        scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "llama: yarn, all options": (
        "llama",
        scaled(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=4.0,
            beta_slow=0.5,
            mscale=0.7,
            mscale_all_dim=1.3,
            truncate=False,
        ),
    ),
    "llama: longrope, short": (
        "llama",
        scaled(rope_type="longrope", original_max_position_embeddings=16, **FACTORS),
    ),
    "llama: longrope, long": (
        "llama",
        scaled(rope_type="longrope", original_max_position_embeddings=8, factor=2.0, **FACTORS),
    ),
    "mistral": ("mistral", {"sliding_window": 3}),
    "mistral: no window": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2: windows": (
        "qwen2",
        {**FOUR, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3: biases, windows by layer": (
        "qwen3",
        {
            **FOUR,
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": MIXED,
        },
    ),
    "smollm3": ("smollm3", {**FOUR}),
    "smollm3: windows": (
        "smollm3",
        {**FOUR, "use_sliding_window": True, "sliding_window": 3, "no_rope_layers": [1, 0, 1, 0]},
    ),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 3,
            "query_pre_attn_scalar": 40,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            **FOUR,
            "head_dim": 16,
            "sliding_window": 3,
            "query_pre_attn_scalar": 24,
            "layer_types": MIXED,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2: scaled by layer, untied": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False, "n_inner": 40},
    ),
    "gpt2: unscaled, relu": (
        "gpt2",
        {"scale_attn_weights": False, "activation_function": "relu"},
    ),
}

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 12))
MASK = np.ones((2, 12), int)
MASK[1, :5] = 0


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch")
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


def model_of(transformers: Any, kind: str, options: dict[str, Any]) -> Any:
    sizes = GPT2_SIZES if kind == "gpt2" else SIZES
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **options})
    model = randomise(
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    )
    if kind.startswith("gemma"):
        # Its norms add 1 to their weights; weights about 1 would make attention so sharp that rounding shows.
        for tensor in model.state_dict().values():
            if tensor.dim() == 1:
                tensor -= 1
    return model


def logits_of(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch

    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    arrays = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        return model(**{name: torch.from_numpy(a) for name, a in arrays.items()}).logits.numpy()


@pytest.mark.torch
@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_and_folders_in_both_directions(
    transformers: Any, tmp_path: Path, variant: str
) -> None:
    kind, options = VARIANTS[variant]
    model = model_of(transformers, kind, options)
    model.save_pretrained(tmp_path / "source")
    apply_fn, params, config = load_model(tmp_path / "source")
    inputs = {"input_ids": TOKENS, "attention_mask": MASK}
    found = np.asarray(jax.jit(apply_fn)(params, inputs))
    expected = logits_of(model, TOKENS, MASK)
    assert config.family == kind
    assert np.abs(expected).max() > 0.5
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[MASK == 1], expected[MASK == 1], rtol=0, atol=1e-5)

    save_model(tmp_path / "target", params, config)
    before, after = load_checkpoint(tmp_path / "source"), load_checkpoint(tmp_path / "target")
    assert {name: t.tobytes() for name, t in before.items()} == {
        name: t.tobytes() for name, t in after.items()
    }
    # What the Flax config alone says, as of a model that was made in JAX.
    text = get(kind).json(config.model) | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "target" / "config.json").write_text(json.dumps(text))
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", attn_implementation="eager"
    )
    # The same weights, at other addresses in memory: torch's products may round otherwise.
    np.testing.assert_allclose(logits_of(again, TOKENS, MASK), expected, rtol=0, atol=2e-6)
