"""A path as a recipe and as a Flax module, beside the search's own function."""

from pathlib import Path as File
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.converters import ModelConfig, load_model, save_model
from jaxmerge.models import (
    GPT2,
    Decoder,
    DecoderConfig,
    GPT2Config,
    LayerKind,
    along,
    in_a_row,
    layer_function,
    layers_of,
)
from jaxmerge.recipes import make_plan, parse, run
from jaxmerge.search.dataflow import program
from jaxmerge.search.dataflow.path import Path
from jaxmerge.search.dataflow.scales import scale_function
from jaxmerge.search.dataflow.slots import Slots

LLAMA = DecoderConfig(
    vocabulary_size=29,
    width=16,
    layers=(LayerKind(),) * 2,
    heads=4,
    key_heads=2,
    head_width=4,
    mlp_width=24,
)
PLAIN = GPT2Config(vocabulary_size=29, context_length=12, width=16, depth=2, heads=2, mlp_width=24)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 29, (2, 8)), jnp.int32)
LAYERS = (0, 3, 2, 3, 1)
SCALES = (0.75, 1.0, 1.5, 0.5, 2.0)
FAMILIES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "llama": (Decoder(LLAMA), ("o_proj", "down_proj")),
    "gpt2": (GPT2(PLAIN), ("c_proj",)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any], File]:
    """A model, two sets of its variables, and the folder where they lie as `a` and `b`."""
    model, _ = FAMILIES[family]
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    folder, both = tmp_path_factory.mktemp(family), []
    for seed, name in enumerate("ab"):
        rng = np.random.default_rng(seed)
        drawn = jax.tree.map(
            lambda x, rng=rng: jnp.asarray(rng.normal(0.2, 0.4, x.shape), x.dtype), shapes
        )
        save_model(folder / name, drawn, ModelConfig(family, model.config))
        both.append(drawn)
    return model, both, folder


def searched(models: tuple[Any, list[Any], File], path: Path, ends: int) -> np.ndarray:
    """What the search computes for the path."""
    model, both, _ = models
    row, joined = in_a_row([model, model], both, ends=ends)
    scale = scale_function(
        "slots", Slots(path.sources, len(path.on) // 4), slot_scales(path), (0.1, 10.0)
    )

    @jax.jit
    def apply(params: Any) -> jax.Array:
        hidden, contexts = row.apply(params, TOKENS, method="begin")
        layers = layers_of(row.config, params)
        on = jnp.asarray(path.on)
        hidden = program.run(layer_function(row), layers, on, scale, hidden, contexts)
        return row.apply(params, hidden, method="logits")

    return np.asarray(apply(joined))


def slot_scales(path: Path) -> jax.Array:
    scales = np.ones(len(path.on), np.float32)
    scales[path.on] = path.scales
    return jnp.asarray(scales)


def merged(models: tuple[Any, list[Any], File], recipe: str, out: File) -> np.ndarray:
    """The logits of what the recipe merges, read as any checkpoint."""
    folder = models[2]
    text = recipe
    for name in "ab":
        text = text.replace(f"model: {name}\n", f"model: {folder / name}\n")
    run(make_plan(parse(text), out=out))
    apply_fn, params, _ = load_model(out)
    return np.asarray(jax.jit(apply_fn)(params, TOKENS))


def test_the_recipe_of_a_path_without_scales_gives_its_logits(models: Any, tmp_path: File) -> None:
    path = Path(LAYERS, (1.0,) * len(LAYERS), (2, 2))
    found = merged(models, path.recipe(["a", "b"], ends="b"), tmp_path / "out")
    wanted = searched(models, path, 1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_the_recipe_of_a_path_with_scales_gives_its_logits_up_to_the_norms_epsilon(
    models: Any, family: str, tmp_path: File
) -> None:
    path = Path(LAYERS, SCALES, (2, 2))
    recipe = path.recipe(["a", "b"], ends="a", outputs=FAMILIES[family][1])
    found = merged(models, recipe, tmp_path / "out")
    wanted = searched(models, path, 0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    without = merged(models, path.recipe(["a", "b"], ends="a", outputs=None), tmp_path / "none")
    assert np.abs(without - wanted).max() > 0.02 * np.abs(wanted).max()


def test_the_module_of_a_path_is_the_searched_function(models: Any) -> None:
    model, both, _ = models
    path = Path(LAYERS, SCALES, (2, 2))
    row, joined = in_a_row([model, model], both)
    module, params = along(row, joined, path.layers, path.scales)
    found = jax.jit(module.apply)(params, TOKENS)
    wanted = searched(models, path, 0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
