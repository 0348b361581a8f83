"""Rows of several models' layers, and the models that run a path through them."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.models import (
    GPT2,
    Decoder,
    DecoderConfig,
    GPT2Config,
    LayerKind,
    Rotary,
    along,
    generate,
    in_a_row,
    layer_function,
    layers_of,
    stack_layers,
    unstack_layers,
)
from jaxmerge.tree import flatten, unstack

FIRST = DecoderConfig(
    vocabulary_size=31,
    width=16,
    layers=(LayerKind(3), LayerKind()),
    heads=4,
    key_heads=2,
    head_width=4,
    mlp_width=24,
)
# Another number of layers, one of a kind that the first does not have, another vocabulary.
SECOND = replace(
    FIRST, layers=(LayerKind(None, Rotary(50.0)), LayerKind(), LayerKind(3)), vocabulary_size=20
)
PLAIN = GPT2Config(vocabulary_size=31, context_length=16, width=16, depth=2, heads=2, mlp_width=24)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 8)), jnp.int32)
ROW = [1, 4, 2, 4]
SCALES = [1.0, 0.5, 2.0, 1.25]


def variables(model: Any, seed: int) -> Any:
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.2, 0.3, x.shape), x.dtype), shapes)


@pytest.fixture(scope="module", params=["decoder", "gpt2"])
def sources(request: pytest.FixtureRequest) -> list[tuple[Any, Any]]:
    """Two models, the second one stacked."""
    if request.param == "decoder":
        models: list[Any] = [Decoder(FIRST), Decoder(SECOND)]
    else:
        models = [GPT2(PLAIN), GPT2(replace(PLAIN, depth=3))]
    params = [variables(model, seed) for seed, model in enumerate(models)]
    stacked = type(models[1])(replace(models[1].config, stacked=True))
    return [(models[0], params[0]), (stacked, stack_layers(params[1]))]


def by_a_loop(sources: list[tuple[Any, Any]], ends: int, layers: Any, scales: Any) -> np.ndarray:
    """Each layer by its own model's function and contexts."""
    model = sources[ends][0]

    @jax.jit
    def apply(variables: list[Any]) -> jax.Array:
        rows = []
        for (one, _), own in zip(sources, variables, strict=True):
            stacked = type(one)(replace(one.config, stacked=True))
            together = own if one.config.stacked else stack_layers(own)
            contexts = stacked.apply(together, TOKENS, method="begin")[1]
            for layer in unstack(layers_of(stacked.config, together)):
                rows.append((layer_function(stacked), layer, contexts))
        hidden, _ = model.apply(variables[ends], TOKENS, method="begin")
        for number, scale in zip(layers, scales, strict=True):
            function, layer, contexts = rows[number]
            hidden = function(layer, hidden * scale, contexts)
        return model.apply(variables[ends], hidden, method="logits")

    return np.asarray(apply([own for _, own in sources]))


def test_a_path_runs_each_layer_as_its_model_does(sources: Any) -> None:
    ends = 1
    models, params = zip(*sources, strict=True)
    row, joined = in_a_row(models, params, ends=ends)
    assert row.config.depth == 5
    found, chosen = along(row, joined, ROW, SCALES)
    logits = jax.jit(found.apply)(chosen, TOKENS)
    wanted = by_a_loop(sources, ends, ROW, SCALES)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    shapes = jax.eval_shape(found.init, jax.random.key(0), TOKENS)
    assert jax.tree.map(jnp.shape, chosen) == jax.tree.map(jnp.shape, shapes)
    assert flatten(unstack_layers(chosen))[0]["params/layers_1/scale"] == 0.5
    # Without scales it is a model of its family.
    plain, picked = along(row, joined, ROW)
    assert type(plain) is type(models[0])
    ones = jax.tree.map(lambda leaf: leaf, chosen)
    ones["params"]["layers"]["scale"] = jnp.ones(len(ROW))
    without = jax.jit(found.apply)(ones, TOKENS)
    np.testing.assert_allclose(jax.jit(plain.apply)(picked, TOKENS), without, rtol=0, atol=1e-4)
    assert np.abs(without - wanted).max() > 0.01


def test_a_path_with_scales_generates() -> None:
    model = GPT2(replace(PLAIN, stacked=True))
    found, chosen = along(model, variables(model, 0), [1, 0, 1], [1.0, 0.5, 2.0])
    text = generate(found, chosen, TOKENS, new_tokens=2)
    whole = jnp.concatenate([TOKENS, text], axis=1)
    best = jnp.argmax(jax.jit(found.apply)(chosen, whole), axis=-1)
    np.testing.assert_array_equal(best[:, TOKENS.shape[1] - 1 : -1], text)


def test_models_that_cannot_stand_in_a_row_are_refused(sources: Any) -> None:
    (first, params), (second, others) = sources
    with pytest.raises(ValueError, match="found 0 models"):
        in_a_row([], [])
    with pytest.raises(ValueError, match="ends=2"):
        in_a_row([first, second], [params, others], ends=2)
    odd = type(first)(replace(first.config, norm_epsilon=0.5))
    with pytest.raises(ValueError, match=r"model 1 has norm_epsilon=0\.5"):
        in_a_row([first, odd], [params, params])
    unlike = Decoder(FIRST) if isinstance(first, GPT2) else GPT2(PLAIN)
    with pytest.raises(ValueError, match="model 1 is a"):
        in_a_row([first, unlike], [params, params])
    narrow = jax.tree.map(lambda leaf: leaf[..., :4], params)
    with pytest.raises(ValueError, match="in model 0, but"):
        in_a_row([first, first], [params, narrow])


def test_layers_that_know_their_place_are_refused() -> None:
    model = GPT2(replace(PLAIN, scale_by_layer=True))
    with pytest.raises(ValueError, match="scale_by_layer"):
        in_a_row([model], [variables(model, 0)])


def test_paths_that_lead_nowhere_are_refused(sources: Any) -> None:
    models, params = zip(*sources, strict=True)
    row, joined = in_a_row(models, params)
    with pytest.raises(ValueError, match="the path is empty"):
        along(row, joined, [])
    with pytest.raises(ValueError, match="layers 0 to 4, found 5"):
        along(row, joined, [0, 5])
    with pytest.raises(ValueError, match="2 layers, but 1 scales"):
        along(row, joined, [0, 1], [1.0])
    with pytest.raises(ValueError, match="stacked layers"):
        along(models[0], params[0], [0])
