"""Key tables: rules read in both directions, and mistakes in a table are found before a checkpoint is read."""

import numpy as np
import pytest

from jaxmerge.converters import CheckpointError
from jaxmerge.converters.families.rules import (
    Rule,
    Transform,
    as_is,
    convolution,
    derive_layout,
    linear,
)
from jaxmerge.converters.model_loading import to_leaf
from jaxmerge.converters.model_saving import to_tensor

KERNEL = Rule("h.{i}.weight", "params/h_{i}/kernel", linear())
BIAS = Rule("h.{i}.bias", "params/h_{i}/bias", as_is())
SHAPES = {"params/h_0/kernel": (2, 3), "params/h_0/bias": (3,), "params/h_10/kernel": (3, 4)}


def test_a_rule_reads_in_both_directions() -> None:
    rule = Rule("s.{i}.{j}.w", "params/s{j}_{i}/kernel")
    assert rule.path_of("s.1.22.w") == "params/s22_1/kernel"
    assert rule.name_of("params/s22_1/kernel") == "s.1.22.w"
    assert rule.path_of("s.1.x.w") is rule.path_of("s.1.02.w") is rule.path_of("as.1.2.w") is None
    twice = Rule("h.{i}.h{i}", "params/h_{i}")
    assert twice.path_of("h.2.h2") == "params/h_2"
    assert twice.path_of("h.2.h3") is None


def test_a_rule_with_other_placeholders_on_each_side_is_refused() -> None:
    with pytest.raises(ValueError, match="the placeholders differ"):
        Rule("h.{i}.weight", "params/h_{j}/kernel")


def test_the_layout_names_every_leaf() -> None:
    layout = derive_layout([KERNEL, BIAS], SHAPES, family="f", prefix="net.")
    assert [layout[path].names for path in SHAPES] == [
        ("net.h.0.weight",),
        ("net.h.0.bias",),
        ("net.h.10.weight",),
    ]
    assert layout["params/h_0/kernel"].axes == (1, 0)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([KERNEL], "no rule matches the leaves 'params/h_0/bias'"),
        (
            [KERNEL, BIAS, Rule("first", "params/h_0/bias")],
            "several rules match the leaves 'params/h_0/bias'",
        ),
        ([KERNEL, BIAS, Rule("scale", "params/scale")], "rule 'params/scale' matches no leaf"),
        (
            [KERNEL, Rule("h.{i}.weight", "params/h_{i}/bias")],
            "'params/h_0/kernel' and 'params/h_0/bias' are both 'h.0.weight'",
        ),
        (
            [Rule("h.{i}.weight", "params/h_{i}/kernel", convolution()), BIAS],
            r"axes \(3, 2, 0, 1\) do not permute shape \(2, 3\)",
        ),
    ],
)
def test_mistakes_in_a_table_name_the_leaf(rules: list[Rule], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"family f: .*{message}"):
        derive_layout(rules, SHAPES, family="f")


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (as_is(), (5,)),
        (linear(), (2, 3)),
        (convolution(), (3, 2, 4, 5)),
        (convolution(1), (3, 4, 5)),
        (Transform(axes=(1, 2, 0), shape=(6, 4)), (4, 2, 3)),
        (Transform(shape=(6,)), (2, 3)),
    ],
)
def test_transforms_are_undone_exactly(transform: Transform, shape: tuple[int, ...]) -> None:
    layout = derive_layout([Rule("w", "w", transform)], {"w": shape}, family="f")["w"]
    leaf = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    tensor = to_tensor(leaf, layout)
    assert tensor.shape == layout.checkpoint_shape(shape)
    np.testing.assert_array_equal(to_leaf(tensor, layout, shape), leaf)
    np.testing.assert_array_equal(tensor, layout.to_checkpoint(leaf))
