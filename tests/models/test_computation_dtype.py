"""The dtype of a computation is the config's; the parameters keep theirs."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.converters import ModelConfig, families
from jaxmerge.converters.families.family import variables_of
from jaxmerge.models import (
    CCTConfig,
    DrivingTransformerConfig,
    InvertedResidualConfig,
    MLPConfig,
    PilotNetConfig,
    ResNetConfig,
    VGGConfig,
)
from jaxmerge.models.inverted_residual import Block

MODELS = {
    "mlp_fc": MLPConfig((4, 3)),
    "vgg": VGGConfig(((4,), (8,)), (5,)),
    "resnet": ResNetConfig((1, 1), (8, 16), norm="group"),
    "mobilenet_v2": InvertedResidualConfig(4, (Block(8, 4, 1, 3),), 8, 3),
    "cct": CCTConfig((8, 8), (8,), layers=1, heads=2, hidden=8),
    "pilotnet": PilotNetConfig((66, 200)),
    "driving_transformer": DrivingTransformerConfig((16, 16), (8, 8), layers=1, heads=2, hidden=8),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", MODELS)
def test_outputs_have_the_dtype_of_the_config_and_leaves_are_float32(
    family: str, dtype: str
) -> None:
    model = replace(MODELS[family], dtype=dtype)
    config, table = ModelConfig(family, model), families.get(family)
    variables = variables_of(table, model)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    outputs = jax.eval_shape(config.apply_fn, variables, table.inputs(model))
    assert outputs.dtype == dtype


def test_bfloat16_is_near_float32() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    model = VGGConfig(((4,), (8,)))
    shapes = variables_of(families.get("vgg"), model)

    def drawn(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        positive = "var" in jax.tree_util.keystr(path)
        draws = rng.normal(size=leaf.shape) / max(1, np.prod(leaf.shape[:-1])) ** 0.5
        return jnp.asarray(draws**2 + 1 if positive else draws, jnp.float32)

    params = jax.tree_util.tree_map_with_path(drawn, shapes)
    exact = jax.jit(ModelConfig("vgg", model).apply_fn)(params, images)
    model = replace(model, dtype="bfloat16")
    rounded = jax.jit(ModelConfig("vgg", model).apply_fn)(params, images)
    error = np.abs(np.asarray(rounded, np.float32) - exact).max()
    assert 0 < error < 0.02 * np.abs(exact).max()
