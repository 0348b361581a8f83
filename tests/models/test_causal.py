"""Causal models in JAX alone: stacked layers, layers in any order, padding, causality, merges of both forms."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.converters import (
    CheckpointError,
    ModelConfig,
    load_checkpoint,
    save_model,
    stack_model,
    unstack_model,
)
from jaxmerge.models import (
    GPT2,
    Decoder,
    DecoderConfig,
    GPT2Config,
    LayerKind,
    Rotary,
    layer_function,
    layers_of,
    stack_layers,
    stack_layout,
    unstack_layers,
)
from jaxmerge.tree import Layout, TensorLayout, unstack

# Layers of three kinds: with a window, without, without positions.
DECODER = DecoderConfig(
    vocabulary_size=31,
    width=16,
    layers=(LayerKind(3), LayerKind(None, Rotary(50.0)), LayerKind(None, None)),
    heads=4,
    key_heads=2,
    head_width=4,
    mlp_width=24,
)
PLAIN = GPT2Config(
    vocabulary_size=31,
    context_length=12,
    width=16,
    depth=3,
    heads=2,
    mlp_width=24,
    scale_by_layer=True,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 8)), jnp.int32)


def variables(model: Any, seed: int = 0) -> Any:
    """Random values of every leaf: initial ones hide what is one or zero."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.3, 0.3, x.shape), x.dtype), shapes)


@pytest.fixture(scope="module", params=["decoder", "gpt2"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """A model, its stacked form, and the parameters of the first."""
    module, config = (Decoder, DECODER) if request.param == "decoder" else (GPT2, PLAIN)
    model = module(config)
    return model, module(replace(config, stacked=True)), variables(model)


@pytest.fixture(scope="module")
def logits(pair: tuple[Any, Any, Any]) -> np.ndarray:
    model, _, params = pair
    return np.asarray(jax.jit(model.apply)(params, TOKENS))


def test_stacked_layers_compute_the_same(pair: Any, logits: np.ndarray) -> None:
    _, stacked, params = pair
    together = stack_layers(params)
    expected = jax.eval_shape(stacked.init, jax.random.key(0), TOKENS)
    assert jax.tree.map(jnp.shape, together) == jax.tree.map(jnp.shape, expected)
    found = jax.jit(stacked.apply)(together, TOKENS)
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)
    apart = unstack_layers(together)
    assert jm.tree.paths(apart) == jm.tree.paths(params)
    for path, leaf in jm.tree.flatten(apart)[0].items():
        np.testing.assert_array_equal(leaf, jm.tree.flatten(params)[0][path])


def test_layers_run_in_any_order_in_one_scan(pair: Any, logits: np.ndarray) -> None:
    model, stacked, params = pair
    together = stack_layers(params)
    layer, layers = layer_function(stacked), layers_of(stacked.config, together)

    def run(order: jax.Array) -> jax.Array:
        hidden, contexts = stacked.apply(together, TOKENS, method="begin")

        def step(hidden: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            return layer(jax.tree.map(lambda leaf: leaf[index], layers), hidden, contexts), None

        hidden, _ = jax.lax.scan(step, hidden, order)
        return stacked.apply(together, hidden, method="logits")

    run = jax.jit(run)
    depth = stacked.config.depth
    np.testing.assert_allclose(run(jnp.arange(depth)), logits, rtol=0, atol=1e-5)
    # As one by one, with a layer's own kind wherever it stands.
    order = [1, 0, *range(2, depth)]
    apart = unstack(layers)

    @jax.jit
    def one_by_one(params: Any) -> jax.Array:
        hidden, contexts = model.apply(params, TOKENS, method="begin")
        for index in order:
            hidden = layer(apart[index], hidden, contexts)
        return model.apply(params, hidden, method="logits")

    found = run(jnp.asarray(order))
    np.testing.assert_allclose(found, one_by_one(params), rtol=0, atol=1e-5)
    assert np.abs(found - logits).max() > 1e-3


def test_padding_on_the_left_changes_nothing(pair: Any, logits: np.ndarray) -> None:
    model, _, params = pair
    padded = jnp.concatenate([jnp.full((2, 3), 7, jnp.int32), TOKENS], axis=1)
    mask = jnp.arange(11)[None] >= jnp.asarray([[3], [3]])
    found = jax.jit(model.apply)(params, padded, mask)
    np.testing.assert_allclose(found[:, 3:], logits, rtol=0, atol=1e-5)
    assert np.isfinite(found).all()


def test_a_token_sees_no_later_one_and_none_beyond_its_window() -> None:
    model = Decoder(replace(DECODER, layers=(LayerKind(3),)))
    params = variables(model)
    layer = layer_function(model)

    @jax.jit
    @jax.grad
    def change(hidden: jax.Array) -> jax.Array:
        _, contexts = model.apply(params, TOKENS, method="begin")
        one = jm.models.Layer(params["params"]["layers_0"], 0)
        return layer(one, hidden, contexts)[0, 6].sum()

    moved = np.abs(change(jnp.ones((2, 8, 16)))).sum(axis=-1)
    assert (moved[0] > 0).tolist() == [False] * 4 + [True] * 3 + [False]


def test_bfloat16_computes_near_float32_and_gives_float32_logits(
    pair: Any, logits: np.ndarray
) -> None:
    model, _, params = pair
    half = type(model)(replace(model.config, dtype="bfloat16"))
    found = jax.jit(half.apply)(params, TOKENS)
    assert found.dtype == jnp.float32
    error = np.abs(found - logits)
    assert 0 < error.mean() < 0.05 * np.abs(logits).mean()


@pytest.mark.parametrize("method", ["dare_ties", "slerp"])
def test_a_merge_of_stacked_layers_is_the_merge_of_single_ones(tmp_path: Path, method: str) -> None:
    family = "smollm3"
    config = replace(DECODER, layers=(LayerKind(), LayerKind(None, None), LayerKind()), tied=True)
    loaded = ModelConfig(family, config)
    trees = [variables(Decoder(config), seed) for seed in range(3)]
    options: dict[str, Any] = {"key": jax.random.key(0)} if method == "dare_ties" else {"t": 0.3}
    models = trees[1:] if method == "dare_ties" else trees[:2]
    bases = trees[0] if method == "dare_ties" else None
    single = jm.merge(method, models, base=bases, layout=loaded.layout, **options)
    _, _, stacked = stack_model(trees[0], loaded)
    assert stacked.layout["params/layers/mlp/up/kernel"] == TensorLayout(
        tuple(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)), axes=(1, 0), stacked=True
    )
    together = jm.merge(
        method,
        [stack_layers(one) for one in models],
        base=None if bases is None else stack_layers(bases),
        layout=stacked.layout,
        **options,
    )
    apply_fn, apart, plain = unstack_model(together, stacked)
    assert plain == loaded
    assert apply_fn is loaded.apply_fn
    for path, leaf in jm.tree.flatten(single)[0].items():
        np.testing.assert_array_equal(jm.tree.flatten(apart)[0][path], leaf, err_msg=path)
    save_model(tmp_path / "stacked", together, stacked)
    save_model(tmp_path / "single", single, loaded)
    written = load_checkpoint(tmp_path / "stacked")
    for name, tensor in load_checkpoint(tmp_path / "single").items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_what_cannot_be_stacked_says_so() -> None:
    with pytest.raises(ValueError, match="'layers_0' and on without a gap"):
        stack_layers({"params": {"layers_1": {"w": jnp.zeros(2)}}})
    with pytest.raises(ValueError, match=r"needs 'layers', found \['head'\]"):
        unstack_layers({"params": {"head": jnp.zeros(2)}})
    differing = {
        "params/layers_0/w": TensorLayout(("h.0.w",), (1, 0)),
        "params/layers_1/w": TensorLayout(("h.1.w",)),
    }
    with pytest.raises(ValueError, match="layers of 'params/layers/w' differ"):
        stack_layout(Layout(differing))
    mlp = ModelConfig("mlp_fc", jm.models.MLPConfig((4, 3)))
    with pytest.raises(CheckpointError, match="family mlp_fc have no stacked form"):
        stack_model({}, mlp)
    with pytest.raises(CheckpointError, match="layers are not stacked"):
        unstack_model({}, ModelConfig("gpt2", PLAIN))


def test_gpt2_refuses_more_tokens_than_it_has_positions() -> None:
    with pytest.raises(ValueError, match="has 12 positions, found 13 tokens"):
        jax.eval_shape(GPT2(PLAIN).init, jax.random.key(0), jnp.zeros((1, 13), jnp.int32))
