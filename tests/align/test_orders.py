"""Permutations of a model are orders of its checkpoint's tensors, in every layout of axes."""

from typing import Any

import jax
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge import models
from jaxmerge.align.orders import tensor_orders
from jaxmerge.converters import families
from jaxmerge.converters.families.family import variables_of
from jaxmerge.converters.model_saving import to_tensor
from jaxmerge.models.decoder import LayerKind
from jaxmerge.models.inverted_residual import Block
from jaxmerge.tree import Layout, TensorLayout, flatten

# Every layout of axes that tables use, fused projections, flattened maps, heads on axes of their own.
CONFIGS: dict[str, Any] = {
    "mlp_fc": models.MLPConfig((6, 8, 9, 3)),
    "vgg": models.VGGConfig(((4,), (8,)), (6,), pool=2),
    "resnet": models.ResNetConfig((1, 2), (8, 16)),
    "mobilenet_v2": models.InvertedResidualConfig(4, (Block(8, 4, 1, 3),), 10, 3),
    "cct": models.CCTConfig((8, 8), (16,), layers=1, heads=2, hidden=20, classes=3),
    "vit_timm": models.ViTConfig((8, 8), (4, 4), 16, 1, 4, 20, fused_qkv=True),
    "gpt2": models.GPT2Config(11, 16, 16, 1, 4, 20),
    "t5": models.T5Config(11, 16, 4, 20, 1, 1, 4),
    "qwen3": models.DecoderConfig(
        11, 16, (LayerKind(),), 4, 2, 6, 20, 16, query_key_norm=True, tied=True
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_taking_entries_in_order_gives_the_permuted_models_checkpoint(name: str) -> None:
    family, config = families.get(name), CONFIGS[name]
    layout, shapes = family.layout(config), family.shapes(config)
    spec = jm.align.symmetry(
        family.apply_fn(config), variables_of(family, config), family.inputs(config)
    )
    permutations = jm.align.random(spec, jax.random.key(1))
    orders = tensor_orders(spec, permutations, layout, shapes)
    numbered = {path: np.arange(np.prod(s, dtype=int)).reshape(s) for path, s in shapes.items()}
    permuted = flatten(jm.align.permute(spec, permutations, numbered))[0]
    assert orders
    for path, leaf in numbered.items():
        (tensor,) = layout[path].names
        taken = to_tensor(leaf, layout[path])
        for axis, index in enumerate(orders.get(tensor, ())):
            taken = taken if index is None else np.take(taken, index, axis)
        np.testing.assert_array_equal(taken, to_tensor(np.asarray(permuted[path]), layout[path]))


def test_an_order_that_depends_on_another_axis_is_refused() -> None:
    spec = jm.align.PermutationSpec.from_axes(
        {"w": ("group", "unit")}, sizes={"group": 2, "unit": 3}, parents={"unit": ["group"]}
    )
    shapes = {"w": (2, 3)}
    with pytest.raises(ValueError, match="'w': the order along one axis of 'w' depends on another"):
        tensor_orders(spec, {}, Layout(), shapes)
    flat = Layout({"w": TensorLayout(("w",), shape=(6,))})
    found = tensor_orders(spec, {"unit": [[0, 1, 2], [2, 0, 1]]}, flat, shapes)
    assert found["w"][0].tolist() == [0, 1, 2, 5, 3, 4]
