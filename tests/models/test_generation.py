"""Generation: transformers' greedy texts, the cache, one program, sampling."""

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import randomise

from jaxmerge.converters import load_model, stack_model
from jaxmerge.models import GPT2, GPT2Config, empty_cache, generate
from jaxmerge.models.generation import Sampling, filter_logits

PROMPTS = np.random.default_rng(1).integers(3, 61, (3, 6))
MASK = np.ones((3, 6), int)
MASK[1, :4] = 0
MASK[2, :1] = 0

SIZES = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        **DECODER,
        # Frequencies change while the text grows.
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
    },
    "gemma3_text": {
        **DECODER,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 64,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 4,
        "n_positions": 24,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch")
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


@pytest.mark.torch
@pytest.mark.parametrize("kind", MODELS)
def test_greedy_texts_are_those_of_transformers(
    transformers: Any, tmp_path: Path, kind: str
) -> None:
    import torch

    config = transformers.AutoConfig.for_model(kind, **SIZES, **MODELS[kind])
    model = randomise(transformers.AutoModelForCausalLM.from_config(config))
    if kind == "gpt2":
        # A random bias would choose one token again and again, as would a tied head.
        model.transformer.ln_f.bias.data.zero_()
    model.save_pretrained(tmp_path)
    prompts, mask = torch.from_numpy(PROMPTS), torch.from_numpy(MASK)
    with torch.no_grad():
        expected = model.generate(
            prompts, attention_mask=mask, max_new_tokens=9, do_sample=False
        ).numpy()[:, 6:]
    assert len({tuple(row) for row in expected}) == 3
    assert len(set(expected[0])) > 1
    # A text ends at its first end token, as transformers has it.
    end = int(expected[0, 3])
    with torch.no_grad():
        ended = model.generate(
            prompts, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=end
        ).numpy()[:, 6:]
    assert end in ended[0, :4]
    _, params, loaded = load_model(tmp_path)
    if kind == "gemma3_text":
        _, params, loaded = stack_model(params, loaded)
    module = loaded.table.module(loaded.model)
    found = generate(module, params, PROMPTS, attention_mask=MASK, new_tokens=9, end=end)
    width = ended.shape[1]
    np.testing.assert_array_equal(found[:, :width], ended)
    assert (found[:, width:] == 0).all()


@pytest.mark.torch
def test_logits_are_filtered_as_transformers_filters_them(transformers: Any) -> None:
    import torch

    warpers = transformers.generation
    logits = np.random.default_rng(0).normal(0, 3, (5, 40)).astype(np.float32)
    logits[0, :3] = logits[0].max()
    for temperature, top_k, top_p in [(0.7, 5, 0.6), (1.5, 1, 0.9), (1.0, 99, 0.3), (2.0, 2, 1.0)]:
        expected = torch.from_numpy(logits)
        for warper in (
            warpers.TemperatureLogitsWarper(temperature),
            warpers.TopKLogitsWarper(top_k),
            warpers.TopPLogitsWarper(top_p),
        ):
            expected = warper(None, expected)
        sampling = Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
        found = np.asarray(filter_logits(jnp.asarray(logits), sampling))
        rows = slice(1, None)
        np.testing.assert_allclose(found[rows], expected.numpy()[rows], rtol=1e-6)


CONFIG = GPT2Config(vocabulary_size=13, context_length=16, width=16, depth=1, heads=2, mlp_width=16)
GPT = GPT2(CONFIG)
IDS = jnp.asarray(PROMPTS[:2] % 13)


@pytest.fixture(scope="module")
def params() -> Any:
    shapes = jax.eval_shape(GPT.init, jax.random.key(0), IDS)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes)


def test_a_cache_gives_the_logits_of_the_whole_text(params: Any) -> None:
    read = jax.jit(lambda ids, cache: GPT.apply(params, ids, cache=cache))
    whole = jax.jit(GPT.apply)(params, IDS)
    first, cache = read(IDS[:, :3], empty_cache(CONFIG, 2, 8))
    second, cache = read(IDS[:, 3:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-5)
    assert cache.used == 6
    assert cache.valid.sum(axis=1).tolist() == [6, 6]


def test_one_program_serves_all_prompts_weights_and_sampling_values(params: Any) -> None:
    class Counted(GPT2):
        @chex.assert_max_traces(n=2)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    model = Counted(CONFIG)
    texts = []
    for seed in range(3):
        other = jax.tree.map(lambda leaf, seed=seed: leaf * (1 + 0.1 * seed), params)
        texts.append(
            generate(
                model,
                other,
                (IDS + seed) % 13,
                new_tokens=4,
                key=jax.random.key(seed),
                temperature=1.0 + seed,
                top_k=3 + seed,
                top_p=0.5 + 0.1 * seed,
                end=[seed],
            )
        )
    assert all(text.shape == (2, 4) for text in texts)


def test_samples_follow_the_models_distribution(params: Any) -> None:
    rows = jnp.tile(IDS[:1], (4000, 1))
    drawn = generate(
        GPT, params, rows, new_tokens=1, key=jax.random.key(0), temperature=2.0, top_k=6
    )
    scores = np.asarray(jax.jit(GPT.apply)(params, IDS[:1])[0, -1], np.float64) / 2
    kept = np.argsort(scores)[-6:]
    expected = np.zeros(13)
    expected[kept] = np.exp(scores[kept]) / np.exp(scores[kept]).sum()
    found = np.bincount(np.asarray(drawn[:, 0]), minlength=13) / 4000
    assert (found[expected == 0] == 0).all()
    # Five standard errors.
    assert np.abs(found - expected).max() < 5 * 0.5 / 4000**0.5


def test_a_key_gives_one_text_and_its_tokens_differ(params: Any) -> None:
    texts = [
        generate(GPT, params, IDS, new_tokens=8, key=jax.random.key(seed), temperature=5.0)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(texts[0], texts[1])
    assert (texts[0] != texts[2]).any()
    assert len(set(np.asarray(texts[0]).ravel().tolist())) > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 0}, "at least 1, found 0"),
        ({"temperature": 0.5}, r"\['temperature'\] need a key"),
        ({"key": 0, "temperature": 0.0}, "temperature must be above 0, found 0.0"),
        ({"key": 0, "top_k": 0}, "top_k must be at least 1, found 0"),
        ({"key": 0, "top_p": 1.5}, r"top_p must lie in \(0, 1\], found 1.5"),
        ({"attention_mask": np.eye(2, 6)}, "padded on the left: attention_mask ends in 0"),
        ({"new_tokens": 12}, "has 16 positions, found 17 tokens"),
    ],
)
def test_bad_arguments_say_so(params: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(GPT, params, IDS, **{"new_tokens": 2, **options})
