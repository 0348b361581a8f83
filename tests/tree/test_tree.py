"""Paths, selection, blocks, layouts, identity, stacking."""

import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxmerge import tree


class Pair(NamedTuple):
    first: float
    second: float


def test_paths_of_containers() -> None:
    nested = {"b": [1.0, (2.0, {"x": 3.0})], "a": Pair(4.0, 5.0), "none": None}
    assert tree.paths(nested) == ["a/first", "a/second", "b/0", "b/1/0", "b/1/1/x"]
    assert tree.paths(3.0) == [""]


def test_linen_variables_and_both_forms_of_nnx_state_have_plain_paths() -> None:
    variables = linen.BatchNorm(use_running_average=True).init(jax.random.key(0), jnp.ones((2, 3)))
    assert tree.paths(variables) == [
        "batch_stats/mean",
        "batch_stats/var",
        "params/bias",
        "params/scale",
    ]
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert tree.paths(state) == tree.paths(nnx.to_pure_dict(state)) == ["bias", "kernel"]
    leaves, definition = tree.flatten(state)
    rebuilt = tree.unflatten(definition, [leaf + 1 for leaf in leaves.values()])
    np.testing.assert_array_equal(rebuilt["kernel"].get_value(), state["kernel"].get_value() + 1)


def test_two_leaves_with_one_path_are_an_error() -> None:
    with pytest.raises(ValueError, match="same path 'a/b'"):
        tree.flatten({"a": {"b": 1}, "a/b": 2})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers/*/kernel", ["layers/0/kernel", "layers/1/kernel"]),
        ("**kernel", ["head/kernel", "layers/0/kernel", "layers/1/kernel"]),
        ("layers/?/bias", ["layers/0/bias"]),
        ("layers/[1-9]/*", ["layers/1/kernel"]),
        (re.compile(r"^head|bias$"), ["head/kernel", "layers/0/bias"]),
        (["head/*", "layers/0/*"], ["head/kernel", "layers/0/bias", "layers/0/kernel"]),
        ("layers", []),
    ],
)
def test_selection(pattern: object, expected: list[str]) -> None:
    params = {
        "layers": [{"kernel": 1, "bias": 2}, {"kernel": 3}],
        "head": {"kernel": 4},
    }
    assert list(tree.select(params, pattern)) == expected  # type: ignore[arg-type]


def test_dotted_checkpoint_names_are_one_segment() -> None:
    assert tree.matches("model.layers.3.mlp.weight", "model.layers.*.mlp.*")


def test_per_block_by_patterns_trees_and_mappings() -> None:
    layout = tree.Layout()
    by_pattern = tree.per_block([0.1, 0.9], {"attn/*": "attention", "**": "rest"})
    assert by_pattern.rows("attn/q", layout.of("attn/q")) == [0]
    assert by_pattern.rows("mlp/up", layout.of("mlp/up")) == [1]
    by_tree = tree.per_block([[1.0, 2.0], [3.0, 4.0]], {"a": {"x": 1}, "b[0]": 0})
    assert by_tree.blocks == (0, 1)
    assert by_tree.rows("b[0]", layout.of("b[0]")) == [0]
    by_name = tree.per_block({"rest": 2.0, "attention": 1.0}, {"attn/*": "attention", "**": "rest"})
    assert by_name.values.tolist() == [1.0, 2.0]


def test_layers_of_a_stacked_leaf_may_belong_to_different_blocks() -> None:
    params = {"layers": {"w": jnp.zeros((3, 2))}}
    layout = tree.stacked_layout(params, {"layers/": "layers/{layer}/"})
    labels = {"layers": {"w": ("early", "early", "late")}}
    assert tree.per_block([1.0, 2.0], labels).rows("layers/w", layout["layers/w"]) == [0, 0, 1]
    by_name = tree.per_block([1.0, 2.0], {"layers/0/**": "early", "**": "late"})
    assert by_name.rows("layers/w", layout["layers/w"]) == [0, 1, 1]


def test_per_block_is_a_pytree_with_static_labels() -> None:
    block = tree.per_block(jnp.ones(2), {"a": "x", "**": "y"})
    mapped = jax.vmap(lambda b: b.values.sum())(
        tree.PerBlock(jnp.ones((5, 2)), block.rules, block.blocks)
    )
    assert mapped.shape == (5,)
    assert hash(jax.tree.structure(block)) == hash(jax.tree.structure(block))


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        ([1.0], {"a": "x", "**": "y"}, r"shape \[2\] or \[2, models\]"),
        ({"x": 1.0}, {"a": "x", "**": "y"}, "no value for block 'y'"),
        ({"x": 1.0, "z": 2.0}, {"a": "x", "**": "y"}, "unknown block 'z'"),
    ],
)
def test_per_block_refuses_what_does_not_fit(values: object, labels: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree.per_block(values, labels)


def test_a_leaf_without_a_label_is_an_error() -> None:
    block = tree.per_block([1.0], {"a": "x"})
    with pytest.raises(ValueError, match="no label for 'b'"):
        block.rows("b", tree.Layout().of("b"))


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_layout_and_its_inverse_are_the_identity(shape: list[int], data: st.DataObject) -> None:
    axes = tuple(data.draw(st.permutations(range(len(shape)))))
    leaf = jnp.arange(np.prod(shape)).reshape(shape)
    flat = (int(np.prod(shape)),)
    for target in (None, flat):
        layout = tree.TensorLayout(("w",), axes, target)
        there = layout.to_checkpoint(leaf)
        np.testing.assert_array_equal(layout.from_checkpoint(there, tuple(shape)), leaf)


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (tree.TensorLayout(("a", "b"), stacked=True), (3, 2), "names 2 layers"),
        (tree.TensorLayout(("a", "b")), (3,), "2 names for one tensor"),
        (tree.TensorLayout(("a",), axes=(0, 0)), (3, 2), "do not permute"),
        (tree.TensorLayout(("a",), shape=(7,)), (3, 2), "does not hold"),
    ],
)
def test_a_layout_that_does_not_fit_is_an_error(
    layout: tree.TensorLayout, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check("w", shape)


def test_layouts_are_hashable_and_compare_by_content() -> None:
    one = tree.Layout({"a": tree.TensorLayout(("x",), (1, 0))})
    other = tree.Layout({"a": tree.TensorLayout(("x",), (1, 0))})
    assert one == other
    assert hash(one) == hash(other)
    assert one != tree.Layout()


def test_names_hash_the_same_in_every_process() -> None:
    code = "from jaxmerge.tree import name_words; print(*name_words('model.layers.0.weight'))"
    command = [sys.executable, "-c", code]
    words = {
        subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
        for env in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    }
    assert len(words) == 1
    assert tuple(map(int, words.pop().split())) == tree.name_words("model.layers.0.weight")


def test_names_rarely_collide() -> None:
    names = [f"model.layers.{i}.experts.{j}.w" for i in range(64) for j in range(256)]
    assert len({tree.name_words(name) for name in names}) == len(names)


def test_stacking_and_unstacking() -> None:
    trees = [{"w": jnp.full((2,), float(i)), "b": [jnp.asarray(i)]} for i in range(3)]
    stacked = tree.stack(trees)
    assert stacked["w"].shape == (3, 2)
    for one, other in zip(trees, tree.unstack(stacked), strict=True):
        np.testing.assert_array_equal(one["w"], other["w"])
    with pytest.raises(ValueError, match="at least one"):
        tree.stack([])
    with pytest.raises(ValueError, match="differ"):
        tree.unstack({"a": jnp.zeros(2), "b": jnp.zeros(3)})
